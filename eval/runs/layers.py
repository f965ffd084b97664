"""Choice of the attention layer: how well each decoder layer's attention finds the answer.

Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language Models* (2025, arXiv
2512.16349), choose the layer of Eq. 22 empirically, for the largest contrast between high and low
attention (section VI-B). Here it is the layer whose regions cover most of the true boxes, on data
with true boxes. For every layer, the model is opened, and the engine runs the first pass and the
region search of each question. Nothing is sent, and no second pass runs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL.Image import Image
from tqdm import tqdm

from eval.analysis.boxes import covered
from eval.runs.loading import ModelOptions, loaded
from eval.runs.methods.method import SamplePictures
from eval.tasks.base import Sample, Task
from server_plugin.backends.base import GenerationRequest
from server_plugin.engines.assembly import engine_of
from server_plugin.engines.two_stage import Engine, RegionNeed, RegionUnavailableError
from server_plugin.models.presets import Preset
from vlm_collab.errors import ConfigError
from vlm_collab.geometry import Box
from vlm_collab.pictures.images import Codec, decode
from vlm_collab.protocol.messages import Fallback, Retransmit


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRegion:
    """The region of one layer on one sample; a row of the Parquet file beside the calibration.

    Attributes:
        layer: index of the layer, from 0.
        index: position of the sample in its task.
        id, image_id: as of the sample.
        true_box, box: the true place and the region, (left, top, right, bottom) in px of the
            upright original.
        covered: share of the true box's area that lies in the region.
    """

    layer: int
    index: int
    id: str
    image_id: str
    true_box: list[int]
    box: list[int]
    covered: float


_BOX = pa.list_(pa.int64())
SCHEMA = pa.schema(
    {
        "layer": pa.int64(),
        "index": pa.int64(),
        "id": pa.string(),
        "image_id": pa.string(),
        "true_box": _BOX,
        "box": _BOX,
        "covered": pa.float64(),
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """How well one layer finds the true box.

    Attributes:
        layer: index of the layer, from 0.
        covered: share of the true box's area that lies in the region, mean over samples.
        whole: share of samples whose true box lies entirely in the region.
        samples: number of samples with a true box.
    """

    layer: int
    covered: float
    whole: float
    samples: int


async def measure_layers(
    task: Task, options: ModelOptions, layers: Sequence[int] | None = None, *, shown: bool = False
) -> tuple[list[LayerRegion], str]:
    """Measure all layers, or some.

    Args:
        task: the benchmark; only samples with a true box are used.
        options: the model, without a layer.
        layers: layers to measure; None for all.
        shown: whether to show a progress bar on stderr.

    Returns:
        A row for each layer and sample, in order, and the model's name.

    Raises:
        ConfigError: no sample has a true box.
    """
    every = ((index, task[index]) for index in range(len(task)))
    samples = [(index, sample) for index, sample in every if sample.true_box is not None]
    if not samples:
        raise ConfigError(f"no sample of {task.name}, split {task.split}, has a true box")
    regions: list[LayerRegion] = []
    remaining = None if layers is None else list(layers)
    name, bar = "", None
    while remaining is None or remaining:
        layer = 0 if remaining is None else remaining[0]
        chosen = ModelOptions(
            name=options.name,
            device=options.device,
            dtype=options.dtype,
            batch=1,
            overrides={**options.overrides, "layer": layer},
        )
        backend, preset = await loaded(chosen, 1)
        try:
            if remaining is None:
                remaining = list(range(backend.info.layers))
            bar = bar or tqdm(
                total=len(remaining) * len(samples), unit="sample", disable=None if shown else True
            )
            engine, name = engine_of(backend, preset, None, {}), backend.info.name
            regions += await _measure(engine, preset, layer, samples, bar.update)
        finally:
            await backend.close()
        remaining.pop(0)
    if bar is not None:
        bar.close()
    return regions, name


def by_layer(regions: Sequence[LayerRegion]) -> list[Layer]:
    """Summarise the rows of each layer, in the rows' order."""
    results = []
    for layer in dict.fromkeys(region.layer for region in regions):
        shares = [region.covered for region in regions if region.layer == layer]
        results.append(
            Layer(
                layer=layer,
                covered=float(np.mean(shares)),
                whole=float(np.mean([share == 1.0 for share in shares])),
                samples=len(shares),
            )
        )
    return results


def best_layer(layers: Sequence[Layer]) -> Layer:
    """The layer that covers most; on ties the lowest."""
    return max(layers, key=lambda one: (one.covered, -one.layer))


def write_regions(path: Path, regions: Sequence[LayerRegion]) -> str:
    """Write the rows to a Parquet file.

    Returns:
        The file's SHA-256.

    Raises:
        ConfigError: it cannot be written.
    """
    table = pa.Table.from_pylist([asdict(region) for region in regions], schema=SCHEMA)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, compression="zstd")
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from error


def read_regions(path: Path) -> list[LayerRegion]:
    """Read a file of `write_regions`.

    Raises:
        OSError: it cannot be read.
    """
    return [LayerRegion(**row) for row in pq.read_table(path, schema=SCHEMA).to_pylist()]


async def _decline(need: RegionNeed) -> Image:
    """Decline the region; only its box is needed."""
    raise RegionUnavailableError(Fallback.DECLINED)


async def _measure(
    engine: Engine,
    preset: Preset,
    layer: int,
    samples: Sequence[tuple[int, Sample]],
    done: Callable[[int], object],
) -> list[LayerRegion]:
    regions, pictures, info = [], SamplePictures(), engine.backend.info
    for index, sample in samples:
        picture = pictures.get(sample)
        codec = Codec[preset.codec.upper()]
        sent = picture.view(info.view, info.fit, codec, preset.quality)
        shown = decode(sent, max_pixels=info.view.width * info.view.height)
        view = await engine.backend.open_view(shown)
        try:
            outcome = await engine.answer(
                view,
                picture.size,
                GenerationRequest(sample.question),
                _decline,
                retransmit=Retransmit.ALWAYS,
            )
        finally:
            await engine.backend.release(view)
        assert sample.true_box is not None
        # No region would show more than the view, so the view counts as the region.
        box = Box(0, 0, *picture.size) if outcome.need is None else outcome.need.box
        regions.append(
            LayerRegion(
                layer=layer,
                index=index,
                id=sample.id,
                image_id=sample.image_id,
                true_box=list(sample.true_box),
                box=list(box),
                covered=covered(sample.true_box, box),
            )
        )
        done(1)
    return regions
