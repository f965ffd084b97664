"""`vlm-collab flops`: cost of a retransmitted question, from a model's small files.

Equations: Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language Models* (2025,
arXiv 2512.16349).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer

from server_plugin.backends.base import GenerationRequest
from server_plugin.cli.options import FitName, Layer, PresetFile, PromptName, ViewSide
from server_plugin.models.presets import Preset
from vlm_collab.method.cost import (
    extension_flops,
    first_pass_flops,
    second_stage_flops,
    total_flops,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes that determine the cost of a question.

    Attributes:
        visual_tokens: n in Song and Kim, Eq. 17.
        hidden_size: d_LLM in Eq. 17.
        layers: L in Eq. 17.
        read_layers: layers that the generic instruction goes through, up to the one whose
            attention is read.
        prefix_tokens: tokens of a prompt up to the end of the global view.
        local_tokens: tokens that a local view adds to a prompt.
        generic_tokens: tokens after the global view with the generic instruction.
        shared: whether the global view's tokens are the same for every question.
    """

    visual_tokens: int
    hidden_size: int
    layers: int
    read_layers: int
    prefix_tokens: int
    local_tokens: int
    generic_tokens: int
    shared: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Decoder operations of one question, in FLOPs.

    Attributes:
        eq_18_first_pass, eq_19_second_stage, eq_20_total: by Eq. 18-20, visual tokens only.
        first_pass, generic_instruction, second_pass, total: prefills of this project's engine,
            text tokens included; the generic instruction once for each view.
        decoding: both answers, token by token; not part of either total.
        ratio: `eq_20_total` divided by `total`.
    """

    eq_18_first_pass: int
    eq_19_second_stage: int
    eq_20_total: int
    first_pass: int
    generic_instruction: int
    second_pass: int
    total: int
    decoding: int
    ratio: float


def costs_of(shape: Shape, question_tokens: int, answer_tokens: int) -> Costs:
    """Compute the costs by Song and Kim, Eq. 17-20, and those of this project's engine.

    Args:
        shape: sizes of the model.
        question_tokens: tokens of a prompt after its pictures.
        answer_tokens: tokens of each answer; the prefill gives the first one.
    """
    n, width, layers = shape.visual_tokens, shape.hidden_size, shape.layers
    prefix = shape.prefix_tokens
    first_context = prefix + question_tokens
    second_context = first_context + shape.local_tokens
    first = extension_flops(0, first_context, width, layers)
    cached, new = (prefix, 0) if shape.shared else (0, prefix)
    generic = extension_flops(cached, new + shape.generic_tokens, width, shape.read_layers)
    second = extension_flops(prefix, second_context - prefix, width, layers)
    total = first + generic + second
    eq_20 = total_flops(n, width, layers, retransmitted=True)
    return Costs(
        eq_18_first_pass=first_pass_flops(n, width, layers),
        eq_19_second_stage=second_stage_flops(n, width, layers),
        eq_20_total=eq_20,
        first_pass=first,
        generic_instruction=generic,
        second_pass=second,
        total=total,
        decoding=sum(
            extension_flops(context + step, 1, width, layers)
            for context in (first_context, second_context)
            for step in range(answer_tokens - 1)
        ),
        ratio=eq_20 / total,
    )


def shape_of(source: str, preset: Preset) -> Shape:
    """Read the sizes from a checkpoint's configuration and tokenizer, without weights.

    Args:
        source: local folder, or hub name.
        preset: how the model is used.

    Raises:
        ModelError: a file is missing or damaged, or the family has no adapter.
        ConfigError: the preset's layer does not exist.
        QuestionError: the context is too short for the model's pictures.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    from server_plugin.backends.transformers.adapters.base import check_family, check_layer
    from server_plugin.backends.transformers.adapters.checkpoint import (
        load_config,
        load_processor,
        local_or_hub,
        model_type_of,
    )
    from server_plugin.backends.transformers.adapters.registry import adapter_for

    models: Any = AutoModelForImageTextToText  # its annotations miss `from_config`
    name = local_or_hub(source)
    adapter_class = adapter_for(model_type_of(name))
    check_family(adapter_class, preset, source)
    config, processor = load_config(name), load_processor(name)
    with torch.device("meta"):  # modules without memory
        model = models.from_config(config)
    adapter = adapter_class(model, processor, preset)
    text, prefix = adapter.decoder.config, len(adapter.prompts.shared().ids)
    check_layer(preset, text, source)
    with_one, with_two = (
        len(
            adapter.prompts.build(
                GenerationRequest(preset.generic_instruction, max_new_tokens=0), pictures
            ).ids
        )
        for pictures in (1, 2)
    )
    return Shape(
        visual_tokens=adapter.layout.visual_tokens,
        hidden_size=text.hidden_size,
        layers=text.num_hidden_layers,
        read_layers=preset.layer + 1,
        prefix_tokens=prefix,
        local_tokens=with_two - with_one,
        generic_tokens=with_one - prefix,
        shared=not adapter.reads_question,
    )


def flops(
    model: Annotated[
        str,
        typer.Argument(help="Hub name or local folder of a checkpoint, or `demo`."),
    ] = "demo",
    question_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a prompt after its pictures.")
    ] = 20,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each answer.")] = 20,
    view_px: ViewSide = None,
    layer: Layer = None,
    preset: PresetFile = None,
    prompt: PromptName = None,
    fit: FitName = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print one JSON line.")] = False,
) -> None:
    """Print the cost of a question, by the paper's equations and as computed by this engine."""
    from server_plugin.backends.open import checkpoint_and_preset

    source, chosen = checkpoint_and_preset(model, preset)
    overrides = {"view_px": view_px, "layer": layer, "prompt": prompt, "fit": fit}
    shape = shape_of(source, chosen.with_overrides(**overrides))
    costs = costs_of(shape, question_tokens, answer_tokens)
    if json_output:
        print(json.dumps({"model": model, **asdict(shape), **asdict(costs)}))
        return
    print(
        f"{model}: {shape.visual_tokens} visual tokens, {shape.layers} layers of width "
        f"{shape.hidden_size}; GFLOP of one retransmitted question"
    )
    for line, count in (
        ("Eq. 18, first pass: F(n)", costs.eq_18_first_pass),
        ("Eq. 19, second stage: F(n) + F(2n)", costs.eq_19_second_stage),
        ("Eq. 20, total", costs.eq_20_total),
        ("this engine: first pass", costs.first_pass),
        ("this engine: generic instruction, once per view", costs.generic_instruction),
        ("this engine: second pass", costs.second_pass),
        (f"this engine: total (Eq. 20 / total: {costs.ratio:.2f})", costs.total),
        (f"decoding two answers of {answer_tokens} tokens", costs.decoding),
    ):
        print(f"  {line:<48}{count / 1e9:>14,.3f}")
