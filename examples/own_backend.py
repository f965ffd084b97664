"""Put a model runtime of your own behind the engine: here plain `transformers`.

    python examples/own_backend.py photo.jpg "what number is on the red circle?"

`PlainBackend` implements `server_plugin.backends.base.Backend` with nothing but `generate`: no
shared caches, no batches, one question at a time. The engine, the service and every client work
on top of it. The script serves it on a free port and asks one question through the edge client.
"""

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration, StoppingCriteria

from edge_client import EdgeClient
from server_plugin.backends.base import (
    GREEDY,
    Generation,
    GenerationRequest,
    ModelInfo,
    RelativeAttention,
    StopRule,
    TextSink,
)
from server_plugin.backends.open import checkpoint_of, preset_of
from server_plugin.engines.assembly import engine_of
from server_plugin.models.presets import Preset
from server_plugin.service.asgi import Service
from server_plugin.service.config import ServiceConfig
from server_plugin.service.runner import running
from vlm_collab.errors import ImageError, QuestionError
from vlm_collab.geometry import Grid, Size
from vlm_collab.method.roi import relative_maps
from vlm_collab.method.uncertainty import TokenStatistics, token_statistics


@dataclass
class PlainView:
    """The one picture of a view."""

    image: Image
    pictures: int = 1

    @property
    def nbytes(self) -> int:
        return self.image.width * self.image.height * 3


class EachToken(StoppingCriteria):
    """Shows the engine each new token, and stops where the engine says so."""

    def __init__(self, backend: "PlainBackend", stop: StopRule | None, on_text: TextSink | None):
        self.backend, self.stop, self.on_text = backend, stop, on_text
        self.steps: list[TokenStatistics] = []
        self.prompt_length: int | None = None

    def __call__(self, input_ids: torch.Tensor, scores: tuple[torch.Tensor, ...], **_) -> bool:
        self.steps.append(token_statistics(scores[-1][0].float().numpy()))
        new = input_ids[0, -len(self.steps) :]
        if self.on_text is not None:
            self.on_text(self.backend.text_of(new))
        ended = int(new[-1]) in self.backend.end_tokens
        return self.stop is not None and self.stop(self.steps, ended)


class PlainBackend:
    """A LLaVA checkpoint behind `generate`, in float32 on the CPU."""

    def __init__(self, folder: str, preset: Preset, name: str) -> None:
        self.preset = preset
        self.processor = AutoProcessor.from_pretrained(folder)
        # Eager attention, because only that returns attention weights.
        self.model = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        end = self.model.generation_config.eos_token_id
        self.end_tokens = {end} if isinstance(end, int) else set(end)
        vision, text = self.model.config.vision_config, self.model.config.text_config
        cells = vision.image_size // vision.patch_size
        self.info = ModelInfo(
            name=name,
            view=Size(vision.image_size, vision.image_size),
            fit=preset.fit,
            grid=Grid(rows=cells, columns=cells),
            base_px=preset.base_px or vision.image_size,
            layer=preset.layer,
            hidden_size=text.hidden_size,
            layers=text.num_hidden_layers,
            visual_tokens=cells * cells,
            context_tokens=text.max_position_embeddings,
        )
        self.one_at_a_time = asyncio.Lock()

    def check_question(self, request: GenerationRequest, images: int = 2) -> None:
        if not request.question.strip():
            raise QuestionError("the question is empty")
        if request.history or request.places or images not in (1, 2):
            raise QuestionError("this backend takes one question about one picture")
        if request.sampling != GREEDY:
            raise QuestionError("this backend always takes the likeliest token")

    async def open_view(self, *images: Image) -> PlainView:
        (image,) = images
        if image.size != self.info.view or image.mode != "RGB":
            raise ImageError(f"a view must be RGB and {self.info.view}, not {image.size}")
        return PlainView(image)

    async def first_pass(
        self,
        view: PlainView,
        request: GenerationRequest,
        *,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        return await self._generate([view.image], request, stop, on_text)

    async def relative_attention(self, view: PlainView, first: Generation) -> RelativeAttention:
        """Attention under the question over attention under the generic instruction."""
        instruction = GenerationRequest(self.preset.generic_instruction, max_new_tokens=1)
        generic = await self._generate([view.image], instruction, None, None)
        assert first.row is not None
        assert generic.row is not None
        return RelativeAttention(
            maps=relative_maps(first.row, generic.row, self.info.grid, epsilon=self.preset.epsilon),
            prefilled_tokens=generic.prefilled_tokens,
            context_tokens=generic.context_tokens,
            layers=self.info.layers,
        )

    async def second_pass(
        self,
        view: PlainView,
        region: Image,
        request: GenerationRequest,
        *,
        picture: int = 0,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        return await self._generate([view.image, region], request, stop, on_text)

    async def text_pass(
        self,
        request: GenerationRequest,
        *,
        stop: StopRule | None = None,
        on_text: TextSink | None = None,
    ) -> Generation:
        return await self._generate([], request, stop, on_text)

    async def release(self, view: PlainView) -> None: ...

    async def warm_up(self) -> None: ...

    async def close(self) -> None: ...

    def text_of(self, ids: torch.Tensor) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()

    async def _generate(
        self,
        images: Sequence[Image],
        request: GenerationRequest,
        stop: StopRule | None,
        on_text: TextSink | None,
    ) -> Generation:
        async with self.one_at_a_time:
            return await asyncio.to_thread(self._blocking, images, request, stop, on_text)

    @torch.inference_mode()
    def _blocking(
        self,
        images: Sequence[Image],
        request: GenerationRequest,
        stop: StopRule | None,
        on_text: TextSink | None,
    ) -> Generation:
        text = self.preset.template.replace("<image>", "<image>" * len(images))
        text = text.replace("{question}", request.question)
        shown = [image.resize(self.info.view) for image in images]
        inputs = self.processor(text=text, images=shown or None, return_tensors="pt")
        each_token = EachToken(self, stop, on_text)
        done = self.model.generate(
            **inputs,
            max_new_tokens=request.max_new_tokens or self.preset.max_new_tokens,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,  # what `EachToken` is shown; greedy decoding leaves logits as is
            output_attentions=True,
            stopping_criteria=[each_token],
        )
        prompt = inputs["input_ids"][0]
        ids = done.sequences[0, len(prompt) :]
        row = None
        if images:
            # One layer of the first step, (1, heads, prompt, prompt); the row of the last token.
            attention = done.attentions[0][self.info.layer][0, :, -1].mean(dim=0)
            visual = attention[prompt == self.model.config.image_token_id]
            row = visual[: self.info.visual_tokens].numpy().astype(np.float32)
        logits = torch.stack(done.logits)[:, 0].double()
        chosen = logits.log_softmax(dim=-1).gather(1, ids[:, None])[:, 0]
        return Generation(
            text=self.text_of(ids),
            token_ids=tuple(ids.tolist()),
            steps=tuple(each_token.steps),
            ended=int(ids[-1]) in self.end_tokens,
            prefilled_tokens=len(prompt),
            context_tokens=len(prompt),
            row=row,
            surprisals=tuple((-chosen / np.log(2)).tolist()),
        )


async def main(photo: Path, question: str) -> None:
    preset = preset_of("demo")
    backend = PlainBackend(checkpoint_of("demo"), preset, "plain")
    engine = engine_of(backend, preset, None, {})
    service = Service(engine, ServiceConfig(port=0))
    async with running(service) as url, EdgeClient(url) as client:
        answer = await client.ask(photo, question)
    print(f"{answer.model}: {answer.text} (first answer: {answer.first_text})")
    print(f"{answer.bytes_up} bytes sent instead of {answer.original_bytes}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photo", type=Path)
    parser.add_argument("question")
    given = parser.parse_args()
    asyncio.run(main(given.photo, given.question))
