"""Add a model family: an adapter for VipLLaVA, on a tiny checkpoint with random weights.

    python examples/own_adapter.py photo.jpg "what is this?"

The checkpoint is made on the spot, so its answers mean nothing; what counts is that an adapter and
a preset are all it takes. To serve the family with `vlm-collab serve`, move the class into
`server_plugin/backends/transformers/adapters/`, name it in `registry.py` there, and put the
preset into `configs/models/` (docs/models.md, "Adding a family").
"""

import argparse
import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from edge_client import EdgeClient
from server_plugin.backends.transformers.adapters.base import Adapter, Layout, square_cells
from server_plugin.backends.transformers.adapters.checkpoint import Processor
from server_plugin.backends.transformers.adapters.prompts import PromptBuilder
from server_plugin.backends.transformers.backend import TransformersBackend
from server_plugin.engines.assembly import engine_of
from server_plugin.models.presets import Preset
from server_plugin.service.asgi import Service
from server_plugin.service.config import ServiceConfig
from server_plugin.service.runner import running
from vlm_collab.geometry import Fit, Grid, Size

PRESET = Preset(
    family="vipllava",
    fit=Fit.STRETCH,
    layer=1,
    prompts={"chat": "###Human: <image>\n{question}###Assistant:"},
    prompt="chat",
    eta=0.0,  # always look twice
    max_new_tokens=8,
)


class VipLlavaAdapter(Adapter):
    """VipLLaVA: the LLaVA architecture with features from several layers of its vision tower."""

    family = "vipllava"
    model_types = ("vipllava",)

    def __init__(self, model: Any, processor: Any, preset: Preset) -> None:
        super().__init__(model, processor, preset)
        image_token_id = model.config.image_token_id
        self._prompts = PromptBuilder(
            processor.tokenizer,
            preset.template,
            image_token=processor.tokenizer.convert_ids_to_tokens(image_token_id),
            image_token_id=image_token_id,
            visual_tokens=self.layout.visual_tokens,
            context_tokens=self.layout.context_tokens,
            turn=preset.turn,
        )

    @classmethod
    def layout_of(cls, config: Any, preset: Preset) -> Layout:
        side, cells = square_cells(config.vision_config, preset)
        return Layout(
            view=Size(side, side),
            grid=Grid(rows=cells, columns=cells),
            visual_tokens=cells * cells,
            context_tokens=config.text_config.max_position_embeddings,
        )

    @property
    def decoder(self) -> Any:
        return self.model.model.language_model

    @property
    def output_head(self) -> Any:
        return self.model.lm_head

    @property
    def prompts(self) -> PromptBuilder:
        return self._prompts

    def encode(self, pictures: Sequence[Image]) -> list[Tensor]:
        pixels = self.processor.image_processor(
            images=[self.fitted(picture) for picture in pictures], return_tensors="pt"
        )["pixel_values"]
        features = self.model.model.get_image_features(pixels.to(self.device, self.dtype))
        return list(features.pooler_output)  # each (visual_tokens, hidden)

    def fitted(self, picture: Image) -> Image:
        # Stretched, as the preset says; the image processor then only normalises.
        return picture.resize(self.layout.view)


def tiny_checkpoint() -> tuple[VipLlavaForConditionalGeneration, Processor]:
    """A model of two layers, a byte-level tokenizer, and an image processor."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        ["what is this?"],
        trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    torch.manual_seed(0)
    config = VipLlavaConfig(
        vision_config=CLIPVisionConfig(
            image_size=112, patch_size=14, hidden_size=32, intermediate_size=64,
            num_hidden_layers=3, num_attention_heads=2,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=512,
        ),
        vision_feature_layer=[-2, -1, 1],
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    side = {"height": 112, "width": 112}
    images = CLIPImageProcessor(size=side, crop_size=side, do_center_crop=False)
    return VipLlavaForConditionalGeneration(config).eval(), Processor(tokenizer, images)


async def main(photo: Path, question: str) -> None:
    model, processor = tiny_checkpoint()
    backend = TransformersBackend(VipLlavaAdapter(model, processor, PRESET), "tiny-vipllava")
    engine = engine_of(backend, PRESET, None, {})
    try:
        service = Service(engine, ServiceConfig(port=0))
        async with running(service) as url, EdgeClient(url) as client:
            answer = await client.ask(photo, question)
    finally:
        await backend.close()
    print(f"{answer.model}: looked at {answer.box}, sent {answer.bytes_up} bytes")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("photo", type=Path)
    parser.add_argument("question")
    given = parser.parse_args()
    asyncio.run(main(given.photo, given.question))
