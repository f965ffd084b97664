"""Benchmark the region search against nested loops.

All variants search the same maps and must find the same boxes. *Plain* loops add up every window
cell by cell; *array* loops sum every window with one call of numpy, as ViCrop does (Zhang et al.,
*MLLMs Know Where to Look: Training-free Perception of Small Visual Details with Multimodal LLMs*,
2025, arXiv 2502.17422). Their time grows with the number of window positions. The summed-area table
needs a few array operations per ratio, about a microsecond each, for any window size. So the gain
is largest for large photos, whose windows are small, and smallest if the grid has few window
positions.

Each repetition times both, one after the other, so that other load slows both alike; the ratio is
the median over the pairs. The last line is one JSON object. Run `python -m eval.bench.roi`.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from vlm_collab.geometry import Box, Fit, Frame, Grid, Size, frame_of
from vlm_collab.method.roi import DEFAULT_RATIOS, find_region, region_box

GRID = Grid(24, 24)
BASE_PX = 336
SOURCES = {
    "0.5 MP": Size(816, 612),
    "TextVQA, 0.7 MP": Size(1024, 683),
    "2 MP": Size(1920, 1080),
    "12 MP": Size(4000, 3000),
    "100 MP": Size(11648, 8736),
}


WindowSum = Callable[[NDArray[np.float64], int, int, int, int], float]


def array_sum(relative: NDArray[np.float64], x: int, y: int, width: int, height: int) -> float:
    """The sum of a window, by numpy."""
    return float(relative[y : y + height, x : x + width].sum())


def plain_sum(relative: NDArray[np.float64], x: int, y: int, width: int, height: int) -> float:
    """The sum of a window, cell by cell."""
    total = 0.0
    for row in range(y, y + height):
        for column in range(x, x + width):
            total += relative[row, column]
    return total


def nested_loops(
    relative: NDArray[np.float64],
    source: Size,
    base_px: int,
    window_sum: WindowSum,
    ratios: Sequence[float] = DEFAULT_RATIOS,
) -> Box:
    """The region search with loops, for a view that shows the whole image."""
    rows, columns = relative.shape
    cell_width, cell_height = source.width / columns, source.height / rows
    best: tuple[float, float, float, int] | None = None
    for ratio in ratios:
        width = max(1, min(int(base_px * ratio / cell_width), columns))
        height = max(1, min(int(base_px * ratio / cell_height), rows))
        if width == columns and height == rows:
            if ratio == 1:
                return Box(0, 0, *source)
            continue
        sums = np.zeros((rows - height + 1, columns - width + 1))
        top, place = -math.inf, (0, 0)
        for x in range(columns - width + 1):
            for y in range(rows - height + 1):
                total = window_sum(relative, x, y, width, height)
                sums[y, x] = total
                if total > top:
                    top, place = total, (x, y)
        x, y = place
        around = []
        if x > 0:
            around.append(sums[y, x - 1])
        if x < columns - width:
            around.append(sums[y, x + 1])
        if y > 0:
            around.append(sums[y - 1, x])
        if y < rows - height:
            around.append(sums[y + 1, x])
        contrast = (top - sum(around) / len(around)) / (width * height)
        if best is None or contrast > best[0]:
            centre_x = x * cell_width + width * cell_width / 2
            centre_y = y * cell_height + height * cell_height / 2
            best = contrast, centre_x, centre_y, int(base_px * ratio / 2)
    if best is None:
        return Box(0, 0, *source)
    half = best[3]
    centre_x = min(max(int(best[1]), half), source.width - half)
    centre_y = min(max(int(best[2]), half), source.height - half)
    return Box(
        max(0, centre_x - half),
        max(0, centre_y - half),
        min(source.width, centre_x + half),
        min(source.height, centre_y + half),
    )


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Mean wall-clock time of one call, in seconds."""
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def measure(source: Size, maps: Sequence[NDArray[np.float64]], inner: int) -> dict[str, float]:
    """Median times and the medians of the paired ratios, over one pair per map."""
    frame: Frame = frame_of(source, Fit.STRETCH, Size(BASE_PX, BASE_PX))
    loops: dict[str, WindowSum] = {"plain": plain_sum, "array": array_sum}
    taken: dict[str, list[float]] = {name: [] for name in (*loops, "table")}
    for warm_up, relative in [(True, maps[0]), *((False, one) for one in maps)]:
        found = region_box(relative, frame, source, BASE_PX)
        times = {"table": seconds(partial(find_region, relative, frame, BASE_PX), inner)}
        for name, window_sum in loops.items():
            if found != (expected := nested_loops(relative, source, BASE_PX, window_sum)):
                raise SystemExit(f"boxes differ: {found} and {expected}")
            loop = partial(nested_loops, relative, source, BASE_PX, window_sum)
            times[name] = seconds(loop, 1)
        if not warm_up:
            for name, time_s in times.items():
                taken[name].append(time_s)
    result = {f"{name}_us": round(statistics.median(t) * 1e6, 1) for name, t in taken.items()}
    for name in loops:
        pairs = zip(taken[name], taken["table"], strict=True)
        result[f"{name}_over_table"] = round(statistics.median(a / b for a, b in pairs), 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=31, help="maps, each timed once per method")
    parser.add_argument("--inner", type=int, default=20, help="fast searches per timing")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    random = np.random.default_rng(options.seed)
    maps = [random.gamma(2.0, size=GRID) for _ in range(options.pairs)]
    results = {}
    for name, source in SOURCES.items():
        results[name] = one = measure(source, maps, options.inner)
        print(
            f"{name:>16} {source.width:>6} x {source.height:<5} table {one['table_us']:>6.1f} us"
            f"   plain loops {one['plain_over_table']:>7.1f} times as long"
            f"   array loops {one['array_over_table']:>6.1f} times"
        )
    summary = {
        "benchmark": "roi",
        "grid": list(GRID),
        "base_px": BASE_PX,
        "pairs": options.pairs,
        "seed": options.seed,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": platform.machine(),
        "results": results,
        "smallest_gain_over_plain_loops": min(r["plain_over_table"] for r in results.values()),
        "smallest_gain_over_array_loops": min(r["array_over_table"] for r in results.values()),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
