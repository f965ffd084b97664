"""Write the data card of a built folder, and ``docs/benchmark.md``.

``python -m eval.signs.card`` writes the page; a test checks that it matches the code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from eval.signs.samples import (
    DEFAULT_COUNT,
    FIRST_SCENE,
    JPEG_QUALITY,
    SPLITS,
    STYLE,
    VIEW_PX,
    Item,
    Kind,
    TextSize,
    item,
    row_of,
)
from eval.signs.scenes import (
    COLOURS,
    FONTS,
    HELD_OUT_FONT,
    HELD_OUT_TEXTURE,
    SHAPES,
    TEXTURES,
    Split,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmark.md"

_HEAD = """---
pretty_name: "vlm-collab: signs"
license: apache-2.0
language: [en]
task_categories: [visual-question-answering]
tags: [synthetic]
configs:
- config_name: default
  data_files:
"""

_TEXT = """\
# Signs: the generated benchmark

Pictures of coloured signs with numbers, large and tiny, and questions about them with their
answers and the boxes that show them. `eval/signs/drawing.py` draws everything, so nothing is
downloaded and the truth is exact. The benchmark has one purpose: it gives a two-stage system real
work on any machine. It is not a stand-in for photographs: figures on it say nothing about TextVQA
or another public benchmark.

    vlm-collab eval run --task signs                       # made as needed
    python -m eval.signs.build --out FOLDER --split test --count 1000

    from eval.tasks import open_task
    samples = open_task("signs", split="val", limit=200)   # or data=FOLDER
    from datasets import load_dataset
    rows = load_dataset(FOLDER, split="test")

The samples in memory and in the folder are the same, down to the bytes of their pictures. The same
versions of Pillow and numpy write the same files bit by bit, with any number of workers. A
thousand questions take about half a minute of one core's time and 68 MB
(`time python -m eval.signs.build --out FOLDER --count 1000 --workers 1`).

## Questions

{per} questions about each picture: one of the first kind, and one of the other kinds in turn.

| kind | question | where the answer is seen (`box`) |
|---|---|---|
| `number` | what number is on the red circle? | the digits |
| `presence` | is there a red circle? If not, colour and shape are any absent pair, \
as in POPE's random set | the sign, if present |
| `colour` | the same words; if not, there is such a shape in another colour, \
as in POPE's adversarial set | the sign of that shape |
| `count` | how many signs are there? | none: the whole picture |

Every other answer of `presence` and `colour` is yes. The words are those that the demo model was
trained on (`demo/vlm_collab_demo/demo_model/README.md`), {colours} colours and {shapes} shapes; it
was not trained on "what colour is …", so colours are asked with yes or no.

`text_size` bins the numbers by the height of the digits in a view of {view} px on a side: tiny,
less than 4 px; small, 4 to 5; medium, 5 to 8; large, 8 px or more. Tiny numbers can only be guessed
in such a view. Text heights have a density proportional to h^-{power:g}, the style of the demo
model's figures.

Scoring (`exact`): 1 if the answer is the right one after the normalisation of the VQA evaluation
(case, punctuation, articles, number words), else 0. Summaries give it by kind and by text size.

## Splits

`train`, `val` and `test` are different scenes with textures of their own. Of `test`, half the
signs use a font ({font}) and half the backgrounds a texture ({texture}) that no other split has;
the others share {fonts} fonts and {textures} textures. Choose thresholds, layers and all other
settings on `val`; `test` is for reporting. Scenes start at number {first:,}: the scenes that served
to choose the demo model's settings and to make its own figures come before. The demo model was
trained on other scenes of `train`; the text style was chosen on other scenes of `val`
(`docs/results/demo-model-choices.json`). A split has no end: `--count` and `limit` say how many
questions are taken from its start ({count} by default).

## Files

One Parquet file for each split, `data/test-00000-of-00001.parquet`, with the columns

| column | |
|---|---|
| `image` | `{{bytes, path}}`: a JPEG of quality {quality}, 4:2:0, as a camera stores it; \
{sizes} px |
| `question_id`, `image_id` | `test-000001`, `test-000000`; both questions about a picture \
have its `image_id` |
| `question`, `answer`, `kind` | as above |
| `text_size`, `text_height_px` | of the number in question; null for the other kinds |
| `box` | left, top, right, bottom in px of the picture, right and bottom exclusive; \
null if there is none |
| `image_width`, `image_height` | in px |

## Counts

"""


def file_of(split: Split) -> str:
    """Path of a split's rows in the folder."""
    return f"data/{split}-00000-of-00001.parquet"


def card(splits: Sequence[tuple[Split, int]]) -> str:
    """The `README.md` of a folder with these splits."""
    files = "".join(f"  - split: {name}\n    path: {file_of(name)}\n" for name, _ in splits)
    return f"{_HEAD}{files}---\n\n{page(splits)}"


def page(splits: Sequence[tuple[Split, int]]) -> str:
    """The card without its front matter."""
    text = _TEXT.format(
        per="Two",
        colours=len(COLOURS),
        shapes=len(SHAPES),
        view=VIEW_PX,
        power=STYLE.text_height_power,
        font=HELD_OUT_FONT,
        texture=HELD_OUT_TEXTURE,
        fonts=len(FONTS),
        textures=len(TEXTURES),
        first=FIRST_SCENE,
        count=DEFAULT_COUNT,
        quality=JPEG_QUALITY,
        sizes="896 × 896, 1120 × 896 or 896 × 1120",
    )
    by_split = {split: [item(split, index) for index in range(count)] for split, count in splits}
    lines = ["| | " + " | ".join(by_split) + " |", "|---|" + "---|" * len(by_split)]
    for name, count in _counted(by_split):
        lines.append(f"| {name} | " + " | ".join(str(count[split]) for split in by_split) + " |")
    digests = [f"- {split}: `{digest(items)}`" for split, items in by_split.items()]
    return (
        text
        + "\n".join(lines)
        + "\n\nSHA-256 of all questions, answers and boxes, a JSON list of the rows without "
        "their pictures:\n\n" + "\n".join(digests) + "\n"
    )


def digest(items: Sequence[Item]) -> str:
    """SHA-256 of the samples without their pictures."""
    rows = json.dumps([row_of(one) for one in items], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(rows.encode()).hexdigest()


def _counted(by_split: dict[Split, list[Item]]) -> list[tuple[str, dict[Split, int]]]:
    pictures = {split: len({one.image_id for one in items}) for split, items in by_split.items()}
    questions = {split: len(items) for split, items in by_split.items()}
    lines = [("pictures", pictures), ("questions", questions)]
    for kind in Kind:
        lines.append((f"`{kind}`", {s: sum(i.kind is kind for i in by_split[s]) for s in by_split}))
    for size in TextSize:
        count = {s: sum(i.text_size is size for i in by_split[s]) for s in by_split}
        lines.append((f"`number`, {size}", count))
    return lines


def main() -> None:
    """Write the page."""
    PAGE.write_text(page([(split, DEFAULT_COUNT) for split in SPLITS]), encoding="utf-8")


if __name__ == "__main__":
    main()
