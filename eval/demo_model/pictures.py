"""Make the demo pictures: ``python -m eval.demo_model.pictures``.

Goes through the test split in order. For each role, takes the first scene with a question that
fits the role with the committed checkpoint and with views and regions sent as JPEG:

* "sure": the first answer is right, and its uncertainty is well below the preset's threshold;
* "asks": the first answer is wrong, and its uncertainty well above the threshold; the answer with
  the model's own region is right.

There is no other selection.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from edge_client.picture import Picture
from eval.demo_model.boxes import own_box
from eval.demo_model.measure import Reader, Reading
from eval.demo_model.questions import EvaluationSettings
from eval.demo_model.views import GRID, SIDE
from eval.demo_model.words import GENERIC
from eval.demo_model.workers import load_model
from eval.signs.drawing import render
from eval.signs.sampling import generate_scene, questions
from eval.signs.scenes import SceneStyle, SignQuestion
from server_plugin.models.presets import preset_named
from vlm_collab.geometry import Box, Fit, Grid, Size
from vlm_collab.method.roi import relative_map
from vlm_collab.pictures.images import Codec

FOLDER = Path(__file__).resolve().parents[2] / "demo" / "vlm_collab_demo" / "pictures"
SIZES = ((1024, 896), (896, 896), (896, 1024), (1152, 896))
QUALITY = 92
QUALITY_SENT = 90
_LARGEST_BYTES = 500_000
_FIRST_INDEX = 100_000  # later than the scenes of any evaluation


@dataclass(frozen=True, slots=True)
class Picked:
    """A picture with its question and the model's answers."""

    file: str
    role: str
    index: int
    size: tuple[int, int]
    question: str
    truth: str
    first_answer: str
    uncertainty_bits: float
    box: tuple[int, int, int, int] | None
    refined_answer: str | None
    text_height_in_view_px: float


def two_passes(
    reader: Reader, picture: Image.Image, question: SignQuestion, settings: EvaluationSettings
) -> tuple[Reading, Reading, tuple[int, int, int, int]]:
    """First answer, refined answer and the box between them."""
    # With the edge client's own scaling: another one could change a close answer.
    shot, side = Picture.from_pil(picture), Size(SIDE, SIDE)
    features = reader.features([_arrived(shot.view(side, Fit.STRETCH, Codec.JPEG, QUALITY_SENT))])
    first = reader.read(features, [question.text])[0]
    generic = reader.read(features, [GENERIC])[0]
    relative = relative_map(
        first.attention[settings.layer],
        generic.attention[settings.layer],
        Grid(GRID, GRID),
        epsilon=settings.epsilon,
    )
    box = own_box(relative, picture.size, settings.base_px)
    place = Box(box[0], box[1], box[2], box[3])
    local = _arrived(shot.region(place, side, Codec.JPEG, QUALITY_SENT))
    # The edge never enlarges a small region; the image processor does.
    local = local.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    own = reader.read(features, [question.text], reader.features([local]))[0]
    return first, own, (box[0], box[1], box[2], box[3])


def _arrived(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def pick(
    model: LlavaForConditionalGeneration, settings: EvaluationSettings, eta_bits: float, out: Path
) -> list[Picked]:
    """Select, save and describe the pictures."""
    reader = Reader(model)
    roles = ["sure", "asks", "asks", "sure"]
    picked: list[Picked] = []
    style = SceneStyle(two_digits=settings.two_digits)
    for index in tqdm(range(_FIRST_INDEX, _FIRST_INDEX + 400), desc="scenes", disable=None):
        if not roles:
            break
        size = SIZES[len(picked) % len(SIZES)]
        scene = generate_scene("test", index, size=size, style=style)
        if len(scene.signs) < 4:
            continue
        buffer = io.BytesIO()
        render(scene).save(buffer, "JPEG", quality=QUALITY)
        if buffer.tell() > _LARGEST_BYTES:
            continue
        picture = Image.open(buffer).convert("RGB")  # what the edge reads from the file
        for question in questions(scene):
            first, own, box = two_passes(reader, picture, question, settings)
            bits = float(first.min_entropy.mean())
            sure = bits < eta_bits
            role = ""
            # Near the threshold, rounding on another processor could change the decision.
            if eta_bits / 1.5 < bits < eta_bits * 1.5:
                continue
            if sure and first.text == question.answer:
                role = "sure"
            elif not sure and first.text != question.answer == own.text:
                role = "asks"
            if role != roles[0]:
                continue
            roles.pop(0)
            name = f"scene-{len(picked) + 1}.jpg"
            (out / name).write_bytes(buffer.getvalue())
            picked.append(
                Picked(
                    file=name,
                    role=role,
                    index=index,
                    size=size,
                    question=question.text,
                    truth=question.answer,
                    first_answer=first.text,
                    uncertainty_bits=round(bits, 3),
                    box=None if sure else box,
                    refined_answer=None if sure else own.text,
                    text_height_in_view_px=round(question.view_text_height_px, 1),
                )
            )
            break
    return picked


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--two-digits", type=float, default=1.0)
    parser.add_argument("--layer", type=int, default=1)
    parser.add_argument("--base-px", type=int, default=320)
    parser.add_argument("--epsilon", type=float, default=0.005)
    eta = preset_named("demo").eta
    parser.add_argument("--eta", type=float, default=eta, help="threshold in bits")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    settings = EvaluationSettings(
        split="test",
        count=0,
        two_digits=options.two_digits,
        layer=options.layer,
        base_px=options.base_px,
        epsilon=options.epsilon,
    )
    picked = pick(load_model(), settings, options.eta, options.out)
    content: dict[str, Any] = {
        "made_by": " ".join(["python -m eval.demo_model.pictures", *sys.argv[1:]]),
        "how_picked": (
            f"Scenes of the test split with at least four signs, in order from index "
            f"{_FIRST_INDEX}; for each role in turn, the first question that fits it with the "
            "demo checkpoint is taken. 'sure': answered well below the threshold and right. "
            "'asks': well above the threshold and wrong at first, right after the model's own "
            "region."
        ),
        "eta_bits": options.eta,
        "pictures": [asdict(item) for item in picked],
    }
    (options.out / "pictures.json").write_text(json.dumps(content, indent=1) + "\n")
    for item in picked:
        print(f"{item.file}: {item.role}: {item.question} {item.truth} ({item.first_answer})")


if __name__ == "__main__":
    main()
