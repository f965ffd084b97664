"""Write the model card: ``python -m eval.demo_model.card``.

Every figure comes from the committed results file; the words around them are here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.demo_model.export import FOLDER

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results" / "demo-model.json"

_HEAD = """---
library_name: transformers
pipeline_tag: image-text-to-text
license: apache-2.0
tags: [demo, llava, synthetic]
---

# The vlm-collab demo model

A LLaVA of {parameters} parameters, trained from scratch on two CPU cores on generated pictures of
coloured signs with numbers. It exists so that `vlm-collab` works from a fresh clone without a
download: it reads large numbers from a 112 x 112 view, is unsure about tiny ones, looks at the
right place, and reads them from a full-resolution region.

**It is a demo model.** It knows nothing but these generated scenes. Its figures are never a
result on TextVQA or any other public benchmark, and say nothing about other models.
"""

_USE = """
## Use

    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained("server_plugin/demo_model")
    processor = AutoProcessor.from_pretrained("server_plugin/demo_model")

Prompts: `USER: <image>\\n{question} ASSISTANT:` for one picture,
`USER: <image><image>\\n{question} ASSISTANT:` for a global view and then a local view. The answer
follows "ASSISTANT:" directly. Questions it was trained on:

- `what number is on the red circle?` (8 colours: red, orange, yellow, green, blue, purple, white,
  black; 5 shapes: circle, square, triangle, diamond, cross)
- `is there a red circle?` and `how many signs are there?`
- `list the signs.`
- `Write a general description of the image.` (describes the background; this is the generic
  instruction that relative attention divides by)

## Architecture

CLIP vision tower (192 wide, 6 layers, 6 heads, 112 px, patches of 14 px: 64 tokens, class token
dropped, last layer), two-layer projector, Llama decoder (192 wide, 4 layers, 6 heads), byte-level
tokenizer of {vocabulary} entries in which digits never merge. bfloat16; key names as in
`llava-hf/llava-1.5-7b-hf`.

## Training

    python -m eval.demo_model.train --recipe eval/demo_model/recipe.yaml --out runs/demo
    python -m eval.demo_model.export --run runs/demo --stage {stage}

Stages (`eval/demo_model/recipe.yaml`): the vision tower alone under dense losses per patch
(sign, colour, shape, each digit, the digit under the patch), first on one-digit signs; then
projector and decoder on packed question answering with the tower frozen; then the same again with
two digits. Muon on hidden matrices, AdamW on the rest, bfloat16 autocast. Each stage is one run
with one seed. The decoder is never told where to look: the attention map arises from answering.
The answer to the generic instruction starts with a word about the background, since a denominator
that looks at the signs would spoil the relative map. The curve is in `training-curve.json`.

This checkpoint's run differs from a fresh run of the recipe in two things: the font `cmb10`
joined the training fonts about 900 steps into `tower-2`, to make reading hold up better in fonts
never seen, and the length of `tower-2` was changed while it ran, with it the pace of its
curriculum and learning rate.

| stage | steps | minutes on two shared CPU cores |
|---|---|---|
{stages}
"""


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _stages(curve: list[dict[str, Any]]) -> str:
    last: dict[str, dict[str, Any]] = {}
    for point in curve:
        last[point["stage"]] = point
    return "\n".join(
        f"| {name} | {point['step']} | {point['seconds'] / 60:.0f} |"
        for name, point in last.items()
    )


def figures(results: dict[str, Any]) -> str:
    """The figures section."""
    test = results["test"]
    settings, accuracy, trade = test["settings"], test["accuracy"], test["trade_off"]
    share = settings["two_digits"]
    digits = {0.0: "all texts of one digit", 1.0: "all texts of two digits"}.get(
        share, f"{share:.0%} of the texts of two digits, the rest of one"
    )

    def held(name: str) -> float:
        row = test["by_layer"][settings["layer"]]
        return float(row[f"{name}_box_holds_text"][str(settings["base_px"])])

    lines = [
        "",
        "## Figures",
        "",
        f"{test['questions']} held-out scenes of the test split at full resolution (three in five",
        "896 x 896, one in five 1120 x 896, one in five 896 x 1120), one question each;",
        f"{digits}. Half of the test signs use a font, half of the backgrounds a",
        "texture, that training never saw. Weights in bfloat16, computed in float32. Attention",
        f"layer {settings['layer']}, base side of the region search {settings['base_px']} px and "
        f"denominator constant {settings['epsilon']:g}",
        "were chosen on the validation split.",
        "",
        "| | |",
        "|---|---|",
        f"| accuracy from the global view alone | {_percent(accuracy['first'])} |",
        f"| with the model's own region, for all questions | {_percent(accuracy['own'])} |",
        f"| with a region around the true place | {_percent(accuracy['true'])} |",
        f"| own region holds the whole text | {_percent(test['own_box_holds_text'])} |",
        "| the same where the first answer is wrong | "
        f"{_percent(test['own_box_holds_text_where_first_wrong'])} |",
        "| AUROC of mean min-entropy, wrong against right first answers | "
        f"{test['auroc']['min_entropy/full']:.3f} |",
        "| share of the full gain at half the retransmissions | "
        f"{_percent(trade['gain_at_half'])} |",
        "",
        "By text height in the 112-px global view:",
        "",
        "| px | questions | global view | own region | true region |",
        "|---|---|---|---|---|",
    ]
    for row in test["by_text_height"]:
        lines.append(
            f"| {row['from_px']:g}-{row['to_px']:g} | {row['count']} | {_percent(row['first'])} "
            f"| {_percent(row['own'])} | {_percent(row['true'])} |"
        )
    chosen = results["val"]["preset"]
    lines += [
        "",
        "Chosen on the validation split, for `configs/models/demo.yaml`: "
        + ", ".join(f"`{key}: {value:g}`" for key, value in chosen.items())
        + " (the threshold keeps 95 % of the gain of sending every region).",
        "",
        "All from `docs/results/demo-model.json`, made by",
        "",
        f"    {test['made_by']['command']}",
        "",
        "## Limits",
        "",
        "- The generic instruction looks at the background and hardly ever at a sign, so the",
        "  plain quotient of the relative map divides by almost nothing there and overrates",
        "  signs that were not asked about:",
        f"  without the constant the box of layer {settings['layer']} holds "
        f"the whole text in {_percent(held('relative'))},",
        f"  with it in {_percent(held('relative_with_epsilon'))} (raw attention: "
        f"{_percent(held('raw'))}).",
        "- One training run with one seed: differences of a few points mean nothing.",
        "- Numbers of one or two digits only; no words, no other objects, no photographs.",
        "- Signs never overlap, and each colour-and-shape pair occurs once in a picture.",
        "- Text under about 4 px in the global view is guessed, as it should be.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Write the card."""
    results = json.loads(RESULTS.read_text())
    curve = json.loads((FOLDER / "training-curve.json").read_text())
    config = json.loads((FOLDER / "config.json").read_text())
    size = (FOLDER / "model.safetensors").stat().st_size
    head = _HEAD.format(parameters=f"{size / 2e6:.1f} million")
    decoders = [point["stage"] for point in curve if "first" in point]
    use = _USE.replace("{question}", "{{question}}").format(
        vocabulary=config["text_config"]["vocab_size"],
        stage=decoders[-1],
        stages=_stages(curve),
    )
    (FOLDER / "README.md").write_text(head + use + figures(results))


if __name__ == "__main__":
    main()
