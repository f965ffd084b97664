"""Model options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from vlm_collab.errors import ConfigError

Device = Annotated[str, typer.Option(help="Device of the model: auto, cpu, cuda, cuda:1 …")]
Dtype = Annotated[
    str, typer.Option(help="Floating point type: auto, float32, bfloat16 or float16.")
]
PromptName = Annotated[
    str | None, typer.Option(help="Prompt template of the preset, such as chat or vicrop.")
]
PresetFile = Annotated[
    str | None,
    typer.Option(
        help="Settings of the model: a YAML file like those in configs/models/, or the name of one "
        "of these. Default: the model's own, or its family's."
    ),
]
FitName = Annotated[
    str | None,
    typer.Option(
        help="How a picture becomes the square view: stretch, pad, or crop, which hides everything "
        "outside the middle square."
    ),
]
ViewSide = Annotated[
    int | None, typer.Option(help="Side of the global view, in px, if the model allows it.")
]
Layer = Annotated[int | None, typer.Option(help="Decoder layer, from 0, whose attention is read.")]
BaseSide = Annotated[
    int | None, typer.Option(help="Base side of the region search, in px of the original.")
]
Ratios = Annotated[
    str | None,
    typer.Option(help="Window sides to try, as multiples of the base side, such as 1.0,1.2,1.4."),
]
Epsilon = Annotated[
    float | None, typer.Option(help="Added to the denominator of the relative attention.")
]
PlacementName = Annotated[
    str | None, typer.Option(help="How the box is placed: sliding or centroid.")
]
BatchSize = Annotated[
    int | None, typer.Option(help="Most questions that the model works on together.")
]


def ratios_of(text: str | None) -> list[float] | None:
    """Return the window sides that `--ratios` names; None without the option.

    Raises:
        ConfigError: a part is not a number.
    """
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--ratios takes numbers separated by commas, such as 1.0,1.2,1.4, not {text!r}"
        ) from None
