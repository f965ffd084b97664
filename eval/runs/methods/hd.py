"""LLaVA-1.5-HD: one larger picture, cut into tiles for the vision encoder, with a thumbnail.

Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language Models* (2025, arXiv
2512.16349), compare with this high-resolution variant in section VII-B. A picture of 448 x 448 px
is split into tiles, which are encoded one by one. The tiles' features are joined to one large map,
in the tiles' order in the picture. The features of a thumbnail follow as context: the whole
picture, reduced to one encoder input. The picture is sent once; there is no second stage.

Any LLaVA-1.5 checkpoint runs. LLaVA-1.5-HD's own weights (13B, an encoder of 224 px, learned
tokens at row ends) were not published for transformers. So its procedure runs here on weights that
were not trained for it, and `run.json` says so. There are 2 x 2 tiles; the picture's side is 4/3 of
the encoder's input (448 to 336), and each tile is enlarged to that input.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.analysis.records import HD, Record
from eval.runs.loading import ModelOptions, facts_of
from eval.runs.methods.method import (
    REFERENCE_QUALITY,
    Codecs,
    EdgeSample,
    EncodedSample,
    Method,
    SampleError,
    SamplePictures,
    Scores,
    as_sample_error,
    one_line,
)
from eval.runs.methods.two_stage import codecs_of, statistics
from eval.runs.wire import SentAnswer, one_stage_bytes
from eval.tasks.base import Sample, Task
from server_plugin.backends.base import Generation, GenerationRequest, ModelInfo
from server_plugin.backends.open import FAKE_MODEL, checkpoint_of
from server_plugin.backends.transformers.adapters.checkpoint import (
    load_config,
    load_model,
    load_processor,
    local_or_hub,
    model_type_of,
)
from server_plugin.backends.transformers.adapters.llava import LlavaAdapter
from server_plugin.backends.transformers.adapters.prompts import PromptBuilder
from server_plugin.backends.transformers.adapters.registry import adapter_for
from server_plugin.backends.transformers.batch import Batch, Row
from server_plugin.backends.transformers.devices import device_of, dtype_of
from server_plugin.backends.transformers.sampling import surprisal
from server_plugin.engines.two_stage import Work
from server_plugin.models.presets import Preset
from vlm_collab.errors import ConfigError
from vlm_collab.geometry import Grid, Size
from vlm_collab.method.policy import Aggregate, Metric, aggregate
from vlm_collab.method.uncertainty import TokenStatistics, token_statistics
from vlm_collab.pictures.images import Codec, decode
from vlm_collab.protocol.messages import Finish

TILES = 2
"""Number of tiles along each side of the picture."""

_GROUP = 4
"""Samples between two saves; each runs by itself."""


def hd_side(encoder_px: int) -> int:
    """Side of the picture that is sent, in px: 448 for an encoder of 336, a multiple of `TILES`."""
    return TILES * round(encoder_px * 448 / 336 / TILES)


@dataclass(frozen=True, slots=True)
class HdAnswer:
    """The model's answer to a question about a picture.

    Attributes:
        generation: the answer; `text` ends before a stop text.
        stopped: whether the model generated a stop text.
    """

    generation: Generation
    stopped: bool


class HdModel:
    """A LLaVA checkpoint with tiled input.

    Args:
        adapter: adapter of the checkpoint.
        preset: prompt and longest answer.
        name: name for messages and provenance.

    Raises:
        ConfigError: the context is too short for so many visual tokens.
    """

    def __init__(self, adapter: LlavaAdapter, preset: Preset, name: str) -> None:
        self._adapter = adapter
        self._end = adapter.end_tokens
        layout, text = adapter.layout, adapter.decoder.config
        cells = layout.grid.rows * layout.grid.columns
        tokens = TILES * TILES * cells + layout.visual_tokens
        self.side = hd_side(layout.view.width)
        if tokens + preset.max_new_tokens >= layout.context_tokens:
            raise ConfigError(
                f"{name} has a context of {layout.context_tokens} tokens, too few for the {tokens} "
                f"of a picture in {TILES} x {TILES} tiles with its thumbnail"
            )
        self.info = ModelInfo(
            name=name,
            view=layout.view,
            fit=preset.fit,
            grid=layout.grid,
            base_px=max(layout.view),
            layer=preset.layer,
            hidden_size=text.hidden_size,
            layers=text.num_hidden_layers,
            visual_tokens=tokens,
            context_tokens=layout.context_tokens,
        )
        self._prompts = PromptBuilder(
            adapter.processor.tokenizer,
            preset.template,
            image_token=adapter.processor.image_token,
            image_token_id=adapter.model.config.image_token_id,
            visual_tokens=tokens,
            context_tokens=layout.context_tokens,
        )

    @classmethod
    def load(cls, name: str, preset: Preset, *, device: str, dtype: str) -> HdModel:
        """Load a checkpoint; arguments as for `server_plugin.backends.open.open_model`.

        Raises:
            ModelError: it is missing or damaged.
            ConfigError: it belongs to another model family.
        """
        folder = local_or_hub(checkpoint_of(name))
        kind = adapter_for(model_type_of(folder))
        if not issubclass(kind, LlavaAdapter):
            raise ConfigError(
                f"the method hd needs a LLaVA model; {name} belongs to the family {kind.family}"
            )
        kind.layout_of(load_config(folder), preset)
        where = device_of(device)
        model = load_model(folder, where, dtype_of(dtype, where))
        return cls(kind(model, load_processor(folder), preset), preset, Path(name).name)

    def check_question(self, question: str, max_new_tokens: int) -> None:
        """See `Backend.check_question`."""
        self._prompts.check(GenerationRequest(question, max_new_tokens=max_new_tokens), 1)

    @torch.inference_mode()
    def visual_tokens(self, picture: Image.Image) -> Tensor:
        """Encode the picture as visual tokens of the decoder.

        Args:
            picture: RGB, `side` x `side` px.

        Returns:
            Shape `(info.visual_tokens, hidden)`: the large map row by row, then the thumbnail.
        """
        tile, grid = self.side // TILES, self._adapter.layout.grid
        view = self._adapter.layout.view
        tiles = [
            picture.crop((x * tile, y * tile, (x + 1) * tile, (y + 1) * tile))
            for y in range(TILES)
            for x in range(TILES)
        ]
        shown = [one.resize(view, Image.Resampling.BICUBIC) for one in [*tiles, picture]]
        *features, thumbnail = self._adapter.encode(shown)
        return torch.cat([merged(features, grid), thumbnail])

    @torch.inference_mode()
    def answer(
        self, picture: Image.Image, question: str, max_new_tokens: int, stop: Sequence[str]
    ) -> HdAnswer:
        """Answer greedily.

        Args:
            picture: RGB, `side` x `side` px.
            question: a question that `check_question` accepted.
            max_new_tokens: longest answer.
            stop: texts at which the answer ends.
        """
        adapter = self._adapter
        prompt = self._prompts.build(GenerationRequest(question, max_new_tokens=max_new_tokens), 1)
        place = prompt.images[0]
        embeddings = torch.cat(
            [
                adapter.embed(prompt.ids[: place.start]),
                self.visual_tokens(picture),
                adapter.embed(prompt.ids[place.stop :]),
            ]
        )
        batch = Batch(adapter, [Row(prompt, None, embeddings)])
        hidden = batch.prefill()
        ids: list[int] = []
        steps: list[TokenStatistics] = []
        surprisals: list[float] = []
        while True:
            logits = adapter.output_head(hidden).float().cpu().numpy()[0]
            ids.append(int(np.argmax(logits)))
            steps.append(token_statistics(logits))
            surprisals.append(surprisal(logits, ids[-1]))
            text, ended = adapter.text_of(ids), ids[-1] in self._end
            found = [mark for mark in stop if mark in text]
            if ended or found or len(ids) >= max_new_tokens:
                break
            hidden = batch.step([ids[-1]])
        for mark in found:
            text = text.partition(mark)[0].rstrip()
        generation = Generation(
            text=text,
            token_ids=tuple(ids),
            steps=tuple(steps),
            ended=ended,
            prefilled_tokens=len(prompt.ids),
            context_tokens=len(prompt.ids),
            surprisals=tuple(surprisals),
        )
        return HdAnswer(generation, bool(found))


def merged(tiles: Sequence[Tensor], grid: Grid) -> Tensor:
    """Join the feature maps of tiles to one map of the picture.

    Args:
        tiles: row by row, each `(visual_tokens, hidden)` with the cells of `grid` at its end.
        grid: grid of one tile.

    Returns:
        Shape `(tiles * rows * columns, hidden)`, row-major over the large map.
    """
    cells = grid.rows * grid.columns
    maps = [tile[len(tile) - cells :].reshape(*grid, -1) for tile in tiles]
    rows = [torch.cat(maps[y : y + TILES], dim=1) for y in range(0, len(maps), TILES)]
    return torch.cat(rows).flatten(0, 1)


class HighResolutionMethod(Method):
    """One larger picture for every sample; arguments as for `TwoStage`."""

    name = HD
    group = _GROUP

    def __init__(
        self,
        task: Task,
        options: ModelOptions,
        *,
        codec: Codec | None = None,
        view_quality: int | None = None,
    ) -> None:
        self._task, self._options = task, options
        self._score = Scores(task)
        self._given_codec = codec, view_quality
        self._pictures = SamplePictures()
        self._model: HdModel
        self._preset: Preset
        self._codecs: Codecs

    async def open(self) -> None:
        name = self._options.name
        if name == FAKE_MODEL:
            raise ConfigError("the method hd needs a model; the fake one has none")
        longest = {"max_new_tokens": self._task.max_new_tokens, **self._options.overrides}
        self._preset = replace(self._options, overrides=longest).preset()
        device, dtype = self._options.settled()
        self._model = await asyncio.to_thread(
            HdModel.load, name, self._preset, device=device, dtype=dtype
        )
        self._codecs = codecs_of(self._preset, *self._given_codec, None)

    async def close(self) -> None:
        pass

    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        model = facts_of(self._options, self._model.info, self._preset)
        note = "LLaVA-1.5-HD's procedure on weights that were not trained for it"
        return {**model, "side": self._model.side, "note": note}, self._codecs.describe()

    def prepare(self, index: int, sample: Sample) -> EncodedSample:
        info, codecs = self._model.info, self._codecs
        side = Size(self._model.side, self._model.side)
        edge_sample = EdgeSample(index, sample, self._pictures.get(sample))
        with edge_sample.at_the_edge():
            sent: bytes = as_sample_error(
                "the picture",
                lambda: edge_sample.picture.view(side, info.fit, codecs.view, codecs.view_quality),
            )
        reference = edge_sample.picture.view(info.view, info.fit, Codec.JPEG, REFERENCE_QUALITY)
        shown = decode(sent, max_pixels=side.width * side.height)
        return EncodedSample(edge_sample, sent, shown, len(reference))

    async def answer(self, ready: Sequence[EncodedSample]) -> list[Record | SampleError]:
        return [await asyncio.to_thread(self._one, one) for one in ready]

    def _one(self, ready: EncodedSample) -> Record | SampleError:
        edge_sample, limit = ready.edge_sample, self._preset.max_new_tokens
        begin = time.perf_counter()
        try:
            self._model.check_question(edge_sample.sample.question, limit)
            answer = self._model.answer(
                ready.shown, edge_sample.sample.question, limit, self._task.stop
            )
        # A model runtime may raise any exception; a failed sample must not end the run.
        except Exception as error:
            return SampleError(one_line(error))
        took_s = time.perf_counter() - begin
        return self._record(ready, answer, took_s)

    def _record(self, ready: EncodedSample, answer: HdAnswer, took_s: float) -> Record:
        edge_sample, generation, work = ready.edge_sample, answer.generation, Work()
        work.add_generation(self._model.info, generation)
        ended = Finish.STOP if answer.stopped else Finish.END if generation.ended else Finish.LENGTH
        ask, answer_bytes = one_stage_bytes(
            edge_sample.sample.question,
            edge_sample.picture.size,
            ready.picture,
            SentAnswer(
                generation.text,
                aggregate(generation.steps, Metric.MIN_ENTROPY, Aggregate.FULL),
                ended,
                work.prefilled_tokens,
                work.decoded_tokens,
                work.flops // 10**6,
            ),
        )
        return Record(
            **edge_sample.facts(),
            view_bytes=len(ready.picture),
            region_bytes=0,
            view_pixels=self._model.side**2,
            region_pixels=0,
            ask_bytes=ask,
            request_bytes=0,
            reply_bytes=0,
            answer_bytes=0,
            first_answer_bytes=answer_bytes,
            reference_bytes=ready.reference_bytes,
            first_text=generation.text,
            second_text="",
            first_score=self._score(generation.text, edge_sample.sample),
            second_score=float("nan"),
            **statistics("first", generation),
            second_tokens=[],
            second_min_entropy=[],
            second_entropy=[],
            second_margin=[],
            second_ended=False,
            map=[],
            map_rows=0,
            map_columns=0,
            box=[],
            side_px=0,
            first_mflops=round(work.flops / 1e6),
            look_mflops=0,
            second_mflops=0,
            first_s=took_s,
            look_s=0.0,
            second_s=0.0,
            edge_s=edge_sample.edge_s,
            first_input_tokens=generation.context_tokens,
        )
