"""Benchmark the edge: time for a view and a region, import time, memory, and install size.

Times of pictures are in units of one full decoding of the same 12-megapixel JPEG by plain Pillow.
Each repetition times a full decoding and the measured operation, one after the other, so that other
load slows both alike. Figures are medians of the paired ratios of one thread's processor time. The
pictures are generated: a scene, the same with sensor noise, and a page of small texts. They differ
most in their share of entropy decoding, which scaled decoding does not save.

An allocator either returns a picture's memory or keeps it for the next picture. A new process, or
one with few questions, works in *fresh* memory, whose first use costs half as much as the decoding.
A process that decodes all the time may work in *kept* memory. Both are measured (glibc).

*View* opens the file, makes the 336 px global view and encodes it. *View and region* also cuts a
region of 672 px and encodes it at 336. *Naive* decodes in full for each of the two. *Decoding at
1/8* is plain Pillow's smallest scaled decoding alone.

Memory is that of a process that asks a local service about such a picture, imports included.

Prints one JSON line per figure; `--out` also writes them to a file. Run `python -m
eval.bench.edge`; `--quality` measures instead the loss of quality by scaled decoding.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from packaging.requirements import Requirement
from PIL import Image, ImageDraw, ImageFont, features

from edge_client.picture import Picture
from eval.signs.drawing import render
from eval.signs.sampling import generate_scene
from vlm_collab.geometry import Box, Fit, Size
from vlm_collab.pictures.images import Codec, encode

SOURCE = Size(4000, 3000)
VIEW = Size(336, 336)
BOX = Box(1664, 1164, 2336, 1836)
GOALS = {
    "view": 0.45,
    "view and region": 1.45,
    "import edge_client": 0.15,
    "resident while asking, view": 60.0,
    "resident while asking, view and region": 60.0,
    "resident while asking, view and the lowest region": 60.0,
    "install": 60.0,
}


@cache
def pictures() -> dict[str, bytes]:
    """12-megapixel JPEG files by name."""
    scene = render(generate_scene("test", 0, size=SOURCE))
    random = np.random.default_rng(0)
    noise = random.normal(0, 3, (SOURCE.height, SOURCE.width, 3)).astype(np.float32)
    noisy = np.clip(np.asarray(scene, np.float32) + noise, 0, 255).astype(np.uint8)
    return {
        "scene": _jpeg(scene, 90),
        "scene with noise": _jpeg(Image.fromarray(noisy), 95),
        "texts": _jpeg(_texts(random), 90),
    }


def _texts(random: np.random.Generator) -> Image.Image:
    page = Image.new("RGB", SOURCE, (230, 225, 210))
    draw = ImageDraw.Draw(page)
    top = 20
    while top < SOURCE.height:
        height = int(random.integers(50, 200))
        letters = random.integers(0, 26, (14, 6))
        words = " ".join("".join(chr(97 + letter) for letter in word) for word in letters)
        colour = tuple(int(value) for value in random.integers(0, 140, 3))
        place = (int(random.integers(0, 200)), top)
        draw.text(place, words, font=ImageFont.load_default(height), fill=colour)
        top += height + 10
    return page


def _jpeg(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def full(data: bytes) -> Image.Image:
    """Decode all pixels by plain Pillow: the unit of time."""
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def view(data: bytes) -> None:
    """The work for a question without a region."""
    Picture.open(data).view(VIEW, Fit.STRETCH, Codec.JPEG, 90)


def view_and_region(data: bytes) -> None:
    """The work for a question with a region."""
    picture = Picture.open(data)
    picture.view(VIEW, Fit.STRETCH, Codec.JPEG, 90)
    picture.region(BOX, VIEW, Codec.JPEG, 90)


def naive(data: bytes) -> None:
    """The same by decoding in full for each."""
    encode(full(data).resize(VIEW, Image.Resampling.BICUBIC), Codec.JPEG, 90)
    cut = full(data).crop(BOX).resize(VIEW, Image.Resampling.BICUBIC)
    encode(cut, Codec.JPEG, 90)


def eighth(data: bytes) -> Image.Image:
    """Decode at 1/8, the smallest scale; most of the remaining work is entropy decoding."""
    image = Image.open(io.BytesIO(data))
    image.draft(None, (SOURCE.width // 8, SOURCE.height // 8))
    image.load()
    return image


CASES: dict[str, Callable[[bytes], None]] = {
    "view": view,
    "view and region": view_and_region,
    "naive": naive,
    "decoding at 1/8": lambda data: eighth(data).close(),
}


_MEMORY = {
    "fresh": {"MALLOC_MMAP_THRESHOLD_": "131072"},
    "kept": {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"},
}


def times(repeats: int) -> Iterator[dict[str, Any]]:
    """Figures of all pictures, in processes with fresh and with kept memory."""
    for memory, settings in _MEMORY.items():
        command = [sys.executable, "-m", "eval.bench.edge", "--times", "--repeats", str(repeats)]
        environment = {**os.environ, **settings}
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        for line in done.stdout.splitlines():
            yield {**json.loads(line), "memory": memory}


def times_here(repeats: int) -> Iterator[dict[str, Any]]:
    """Figures of all pictures, in this process."""
    for name, data in pictures().items():
        for figure in in_decodes(data, repeats):
            yield {**figure, "picture": name, "picture_mb": round(len(data) / 1e6, 2)}


def in_decodes(data: bytes, repeats: int) -> Iterator[dict[str, Any]]:
    """Figures of one picture."""
    ratios: dict[str, list[float]] = {name: [] for name in CASES}
    units = []
    for repeat in range(repeats + 1):
        for name, case in CASES.items():
            unit = _seconds(lambda: full(data))
            ratio = _seconds(lambda case=case: case(data)) / unit  # type: ignore[misc]
            if repeat:  # the first is the warm-up
                units.append(unit)
                ratios[name].append(ratio)
    for name, found in ratios.items():
        low, middle, high = statistics.quantiles(found, n=4)
        yield {
            "figure": name,
            "value": round(middle, 3),
            "unit": "full decodings",
            "quartiles": [round(low, 3), round(high, 3)],
            "full_decoding_ms": round(statistics.median(units) * 1e3, 1),
        }


def _seconds(call: Callable[[], object]) -> float:
    begin = time.thread_time()
    call()
    return time.thread_time() - begin


def importing(repeats: int) -> Iterator[dict[str, Any]]:
    """Processor time of new processes, minus that of an empty one."""
    codes = {
        "import edge_client": "import edge_client",
        "import edge_client.EdgeClient": "from edge_client import EdgeClient",
    }
    for name, code in codes.items():
        empty, found = [], []
        for repeat in range(repeats + 1):
            pair = _process_s("pass"), _process_s(code)
            if repeat:
                empty.append(pair[0])
                found.append(pair[1])
        beyond = [one - nothing for one, nothing in zip(found, empty, strict=True)]
        units = [one / nothing for one, nothing in zip(found, empty, strict=True)]
        yield {
            "figure": name,
            "value": round(statistics.median(beyond), 4),
            "unit": "s beyond python -c pass",
            "in_python_c_pass": round(statistics.median(units), 2),
            "python_c_pass_s": round(statistics.median(empty), 4),
        }


def _process_s(code: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


# Runs in a process of its own; VmHWM is its peak memory.
_ASKING = """
import re, sys, edge_client
from pathlib import Path
url, photo, question, *deepest = sys.argv[1:]
with edge_client.Client(url) as client:
    answer = client.ask(photo, question)
    if deepest:
        from vlm_collab.geometry import Box, Size
        picture = edge_client.Picture.open(photo)
        width, height = picture.size
        corner = Box(width - 672, height - 672, width, height)
        picture.region(corner, Size(336, 336), edge_client.Codec.JPEG, 90)
    status = Path("/proc/self/status").read_text()
found = [re.search(rf"{name}:\\s+(\\d+)", status)[1] for name in ("VmRSS", "VmHWM")]
print(answer.refined, *found)
"""


def resident(data: bytes) -> Iterator[dict[str, Any]]:
    """Memory of a process that asks, with and without a region (Linux)."""
    with tempfile.TemporaryDirectory() as folder, _serving() as url:
        photo = Path(folder) / "photo.jpg"
        photo.write_bytes(data)
        sure, unsure = "what colour is the sky?", "what is on the small sign?"
        for name, *arguments in (
            ("view", sure),
            ("view and region", unsure),
            ("view and the lowest region", unsure, "deepest"),
        ):
            command = [sys.executable, "-c", _ASKING, url, str(photo), *arguments]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            refined, now_kb, most_kb = done.stdout.split()
            if (refined == "True") != (arguments[0] == unsure):
                raise SystemExit(f"unexpected answer of the service: {done.stdout}")
            yield {
                "figure": f"resident while asking, {name}",
                "value": round(int(most_kb) * 1024 / 1e6, 1),
                "unit": "MB at most",
                "after_the_answer_mb": round(int(now_kb) * 1024 / 1e6, 1),
            }


@contextmanager
def _serving() -> Iterator[str]:
    """A local service that answers without a model."""
    from server_plugin.backends.fake import FakeBackend
    from server_plugin.engines.two_stage import Engine
    from server_plugin.service.asgi import Service
    from server_plugin.service.config import ServiceConfig
    from server_plugin.service.runner import running
    from vlm_collab.method.policy import Aggregate, Metric, ThresholdPolicy

    policy = ThresholdPolicy(Metric.MIN_ENTROPY, Aggregate.FULL, 0.5)
    ready, stop = threading.Event(), threading.Event()
    found: list[str] = []

    async def serve() -> None:
        engine = Engine(backend=FakeBackend(), policy=policy)
        async with running(Service(engine, ServiceConfig(port=0))) as url:
            found.append(url)
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    ready.wait()
    try:
        yield found[0]
    finally:
        stop.set()
        thread.join()


def install() -> dict[str, Any]:
    """Size of `pip install vlm-collab` on a device, computed from the files installed here.

    Compiled bytecode, which pip makes, is counted. Training code and benchmarks are not: the wheel
    leaves them out.
    """
    sizes = {}
    waiting = ["vlm-collab"]
    while waiting:
        name = waiting.pop()
        if name in sizes:
            continue
        found = distribution(name)
        sizes[name] = sum(
            path.stat().st_size
            for path in (Path(str(found.locate_file(file))) for file in found.files or ())
            if path.is_file()
        )
        for needed in map(Requirement, found.requires or ()):
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                waiting.append(needed.name)
    root = Path(__file__).resolve().parents[2]
    sizes["vlm-collab"] = sum(  # an editable install lists no files
        path.stat().st_size
        for package in ("vlm_collab", "edge_client", "server_plugin", "eval", "configs")
        for path in (root / package).rglob("*")
        if path.is_file() and not {"demo_model", "bench"} & set(path.parts)
    )
    return {
        "figure": "install",
        "value": round(sum(sizes.values()) / 1e6, 1),
        "unit": "MB",
        "largest_mb": {
            name: round(size / 1e6, 1)
            for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:5]
        },
    }


def quality() -> Iterator[dict[str, Any]]:
    """Quality of encoded views that come from scaled decoding, compared with the best view."""
    for name, data in pictures().items():
        decoded = full(data)
        for side in (224, 336, 448, 672):
            size = Size(side, side)
            best = decoded.resize(size, Image.Resampling.BICUBIC)
            ours = Picture.open(data).view(size, Fit.STRETCH, Codec.JPEG, 90)
            least = eighth(data).resize(size, Image.Resampling.BICUBIC)
            whole = Picture.from_pil(decoded).view(size, Fit.STRETCH, Codec.JPEG, 90)
            yield {
                "figure": "quality of the view",
                "picture": name,
                "side_px": side,
                "value": round(_psnr(ours, best), 2),
                "unit": "dB to the view before it is encoded",
                "from_a_full_decoding": round(_psnr(whole, best), 2),
                "from_decoding_at_1/8": round(_psnr(encode(least, Codec.JPEG, 90), best), 2),
            }


def _psnr(encoded: bytes, other: Image.Image) -> float:
    one = np.asarray(Image.open(io.BytesIO(encoded)), np.float64)
    error = float(((one - np.asarray(other, np.float64)) ** 2).mean())
    return 10 * float(np.log10(255**2 / error))


def figures(repeats: int) -> Iterator[dict[str, Any]]:
    """All figures but quality."""
    yield from times(repeats)
    yield from importing(repeats)
    yield from resident(pictures()["scene with noise"])
    yield install()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="pairs behind each median")
    parser.add_argument("--quality", action="store_true", help="quality instead of costs")
    parser.add_argument("--runs", type=int, default=1, help="repetitions of the whole benchmark")
    parser.add_argument("--times", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="file to collect the lines in")
    options = parser.parse_args()
    if options.times:
        for figure in times_here(options.repeats):
            print(json.dumps(figure), flush=True)
        return
    machine = {
        "benchmark": "edge",
        "repeats": options.repeats,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version_feature("libjpeg_turbo"),
    }
    lines = []
    for run in range(1, options.runs + 1):
        for figure in quality() if options.quality else figures(options.repeats):
            goal = GOALS.get(figure["figure"])
            entry = {**figure, **({"goal": goal} if goal else {}), "run": run, **machine}
            line = json.dumps(entry)
            print(line, flush=True)
            lines.append(line)
    if options.out is not None:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
