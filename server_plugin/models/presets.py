"""Model presets: settings of a model family for two-stage inference, from YAML files.

A preset is one file in `configs/models/`. Decoding is strict: an unknown key, a wrong type or a
value out of range is refused with one line that names the file and the key. This module needs
neither torch nor transformers.

Equations and sections: Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language
Models* (2025, arXiv 2512.16349).
"""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import msgspec.inspect

from vlm_collab.errors import ConfigError
from vlm_collab.geometry import Fit
from vlm_collab.method.policy import DEFAULT_FIRST_TOKENS, Aggregate, Metric, ThresholdPolicy
from vlm_collab.method.roi import DEFAULT_RATIOS, Placement

IMAGE_SLOT = "<image>"
"""Position of the visual tokens in a template, whatever the model's own image token."""

QUESTION_SLOT = "{question}"
ANSWER_SLOT = "{answer}"

GENERIC_INSTRUCTION = "Write a general description of the image."
"""The instruction s' in Song and Kim, Eq. 22."""

Text = Annotated[str, msgspec.Meta(min_length=1)]
Positive = Annotated[int, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0.0)]
Ratio = Annotated[float, msgspec.Meta(gt=0.0, le=100.0)]


class Preset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one model family. Immutable; checked when decoded.

    Attributes:
        family: name of the adapter (`server_plugin.backends.transformers.adapters`).
        models: globs of the hub names or folder names that this preset is for.
        family_default: whether it also serves checkpoints of its family that no preset names.
        fit: how a source picture is brought to the encoder's input: `stretch`, `pad`, or `crop`,
            which hides everything outside the middle square from both passes.
        view_px: side of the global view, in px, for models with a free choice; None: the model's
            only side, or the family's default.
        layer: decoder layer, from 0, whose attention gives the relative map.
        qformer_layer: cross-attention layer of the Q-Former, counted from 0 among those layers,
            whose attention leads from query tokens to patches; used only in families with a
            Q-Former.
        ratios: window sides of the region search over the base side, in the order tried.
        base_px: base side of the region search in px; None: the encoder's input side.
        placement: how the box is placed: `sliding`, the search of Song and Kim, or `centroid`.
        prompts: templates by name, each with one `<image>` before one `{question}`. With two
            pictures, `<image>` stands for both, global view first (Eq. 12).
        turns: by a template's name, the template of each further turn of a conversation: one
            `{answer}` to the question before, then one `{question}`. Templates without an entry
            take single questions only.
        prompt: name of the template in use.
        instructed: names of the templates that say how to answer. Benchmarks then add no such
            instruction of their own after the question.
        generic_instruction: replaces the question to compute the generic attention.
        metric: uncertainty metric of the retransmission policy (Eq. 14-16).
        aggregate: how token statistics become one number: all tokens, the first `k`, the first.
        eta: threshold on the uncertainty, in bits (a probability difference for `margin`).
        k: number of tokens for `first_k`.
        include_end: whether the end-of-sequence token counts as a generated token.
        max_new_tokens: longest answer, in tokens.
        local_view_px: side of the requested local view, in px; None: the encoder's input side.
        codec: image codec requested of the edge.
        quality: the codec's quality, 1 to 100.
        epsilon: added to the denominator of Eq. 22.
    """

    family: Text
    models: tuple[Text, ...] = ()
    family_default: bool = False
    fit: Fit
    view_px: Positive | None = None
    layer: Annotated[int, msgspec.Meta(ge=0)]
    qformer_layer: Annotated[int, msgspec.Meta(ge=0)] = 2
    ratios: Annotated[tuple[Ratio, ...], msgspec.Meta(min_length=1)] = DEFAULT_RATIOS
    base_px: Positive | None = None
    placement: Placement = Placement.SLIDING
    prompts: Annotated[dict[Text, Text], msgspec.Meta(min_length=1)]
    turns: dict[Text, Text] = {}
    prompt: Text
    instructed: tuple[Text, ...] = ()
    generic_instruction: Text = GENERIC_INSTRUCTION
    metric: Metric = Metric.MIN_ENTROPY
    aggregate: Aggregate = Aggregate.FULL
    eta: NotNegative
    k: Positive = DEFAULT_FIRST_TOKENS
    include_end: bool = True
    max_new_tokens: Positive = 20
    local_view_px: Positive | None = None
    codec: Literal["jpeg", "png", "webp"] = "jpeg"
    quality: Annotated[int, msgspec.Meta(ge=1, le=100)] = 90
    epsilon: NotNegative = 0.0

    def __post_init__(self) -> None:
        for name, template in self.prompts.items():
            if template.count(IMAGE_SLOT) != 1 or template.count(QUESTION_SLOT) != 1:
                raise ValueError(
                    f"prompt {name!r} needs {IMAGE_SLOT} and {QUESTION_SLOT} once each"
                )
            # Visual tokens of a view are computed once and shared by all questions about it, so
            # no text that depends on the question may stand before them.
            if template.index(IMAGE_SLOT) > template.index(QUESTION_SLOT):
                raise ValueError(f"prompt {name!r} needs {IMAGE_SLOT} before {QUESTION_SLOT}")
        for name, turn in self.turns.items():
            if turn.count(ANSWER_SLOT) != 1 or turn.count(QUESTION_SLOT) != 1:
                raise ValueError(f"turn {name!r} needs {ANSWER_SLOT} and {QUESTION_SLOT} once each")
            if turn.index(ANSWER_SLOT) > turn.index(QUESTION_SLOT) or IMAGE_SLOT in turn:
                raise ValueError(f"turn {name!r} needs {ANSWER_SLOT} before {QUESTION_SLOT} only")
        for name in (self.prompt, *self.instructed):
            if name not in self.prompts:
                known = ", ".join(sorted(self.prompts))
                raise ValueError(f"no prompt is named {name!r} (there are: {known})")
        self.policy()  # raises if the metric cannot reach the threshold

    @property
    def template(self) -> str:
        """The template in use, with its `<image>` and `{question}`."""
        return self.prompts[self.prompt]

    @property
    def turn(self) -> str | None:
        """The template of further turns; None if `template` takes single questions only."""
        return self.turns.get(self.prompt)

    def policy(self) -> ThresholdPolicy:
        """The retransmission policy of this preset (Song and Kim, section V-A)."""
        return ThresholdPolicy(
            self.metric, self.aggregate, self.eta, k=self.k, include_end=self.include_end
        )

    @property
    def says_how_to_answer(self) -> bool:
        """Whether the template in use says how to answer; see `instructed`."""
        return self.prompt in self.instructed

    @property
    def warning(self) -> str | None:
        """One line for the person who starts the model; None if there is nothing to warn of."""
        warning = self.fit.warning
        return warning and f"{warning}; --fit stretch and --fit pad show all of it"

    def names(self, model: str) -> bool:
        """Whether one of the globs matches a hub name, or the last part of a path."""
        return any(
            fnmatch.fnmatchcase(candidate, glob)
            for glob in self.models
            for candidate in (model, Path(model).name)
        )

    def with_overrides(self, **overrides: object) -> Preset:
        """Return a copy with some fields replaced; None keeps a field.

        Raises:
            ConfigError: a field is unknown, or does not take the value.
        """
        fields: dict[str, Any] = msgspec.to_builtins(self)
        fields.update({name: value for name, value in overrides.items() if value is not None})
        try:
            return msgspec.convert(fields, Preset)
        except msgspec.ValidationError as error:
            raise ConfigError(f"model option: {_one_line(error)}") from error


def config_folder() -> Path:
    """Return the folder `configs/`: in the installed package, or in the root of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def load_preset(path: Path) -> Preset:
    """Read one preset file.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not fit the schema; one line that
            names the file and the key.
    """
    # PyYAML is in the `server` extra, and this module is also imported without that extra.
    import yaml

    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"preset {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"preset {path} is not YAML: {_one_line(error)}") from error
    try:
        return msgspec.convert(fields, Preset)
    except msgspec.ValidationError as error:
        raise ConfigError(f"preset {path}: {_one_line(error)}") from error


def load_presets(folder: Path | None = None) -> dict[str, Preset]:
    """Read every preset, by file name without its ending, in alphabetical order.

    Raises:
        ConfigError: there is no preset, or one of them is invalid.
    """
    folder = folder or config_folder() / "models"
    presets = {path.stem: load_preset(path) for path in sorted(folder.glob("*.yaml"))}
    if not presets:
        raise ConfigError(f"there are no model presets in {folder}")
    return presets


def preset_named(name: str) -> Preset:
    """Return a preset by its file name without ending.

    Raises:
        ConfigError: no preset has that name.
    """
    presets = load_presets()
    if name not in presets:
        raise ConfigError(f"there is no preset {name!r}; there are: {', '.join(presets)}")
    return presets[name]


def preset_for_model(model: str) -> Preset | None:
    """Return the preset whose globs match a hub name or folder, or None."""
    return next((preset for preset in load_presets().values() if preset.names(model)), None)


def preset_for_family(family: str) -> Preset:
    """Return the preset for checkpoints of a family that no preset names.

    Raises:
        ConfigError: the family has an adapter but no preset.
    """
    for preset in load_presets().values():
        if preset.family == family and preset.family_default:
            return preset
    raise ConfigError(
        f"no preset in {config_folder() / 'models'} is the default of the family {family!r} "
        "(one YAML preset with `family_default: true`, see docs/models.md)"
    )


def _one_line(error: Exception) -> str:
    """Return an error as one line, with the known values if the field takes only a few."""
    line = " ".join(str(error).split())
    field = line.rpartition("$.")[2].rstrip("`")
    known = _CHOICES.get(field)
    return f"{line}; known: {', '.join(known)}" if known else line


_CHOICES = {
    field.name: [str(member.value) for member in field.type.cls]
    for field in msgspec.inspect.type_info(Preset).fields  # type: ignore[attr-defined]
    if isinstance(field.type, msgspec.inspect.EnumType)
}
