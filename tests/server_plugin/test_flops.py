"""Eq. 17 of Song and Kim against the operations that were executed, term by term.

The paper: *Collaborative Edge-to-Server Inference for Vision-Language Models* (2025, arXiv
2512.16349).

Every term is a whole number, so the sums must be equal. Each operation that Eq. 17 leaves out or
counts in another way is a term with a name here.
"""

from __future__ import annotations

import asyncio
import json
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from edge_client.cli.main import main
from eval.bench.flop_count import counted
from server_plugin.backends.base import GenerationRequest
from server_plugin.backends.transformers.backend import TransformersBackend
from server_plugin.cli.flops import Shape, costs_of, shape_of
from server_plugin.engines.two_stage import Engine, RegionNeed
from server_plugin.models.presets import config_folder, preset_for_family, preset_named
from tests.support.oracle import picture
from tests.support.tiny_instructblip import save_tiny_instructblip
from tests.support.tiny_llava import TinyLlava, save_tiny_llava
from tests.support.tiny_qwen import save_tiny_qwen
from vlm_collab.errors import ConfigError
from vlm_collab.geometry import Size
from vlm_collab.method.cost import extension_flops, flops, total_flops
from vlm_collab.method.policy import AlwaysPolicy

QUESTION = "what is written on the large red sign?"
SOURCE = Size(1200, 800)
LAYER = 1
_PROJECT = Path(__file__).parents[2] / "pyproject.toml"

# As Eq. 17 assumes: as many key heads as query heads, and feed-forward matrices of 16·d² FLOPs per
# token (three of width 8/3·d, nearly as in LLaVA-1.5; two of 4·d in the papers).
AS_IN_EQ_17 = TinyLlava(hidden=96, heads=4, key_value_heads=4, intermediate=256)
# As in newer decoders: fewer key heads, another feed-forward width.
OTHERWISE = TinyLlava(hidden=64, heads=4, key_value_heads=2, intermediate=224)


@pytest.fixture(scope="module", params=[AS_IN_EQ_17, OTHERWISE], ids=["as in Eq. 17", "otherwise"])
def shape(request: pytest.FixtureRequest) -> TinyLlava:
    shape: TinyLlava = request.param
    return shape


@pytest.fixture(scope="module")
def folder(shape: TinyLlava, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llava(tmp_path_factory.mktemp("tiny"), shape)


@pytest.fixture(scope="module")
def backend(folder: Path) -> Iterator[TransformersBackend]:
    preset = preset_named("demo").with_overrides(layer=LAYER)
    backend = TransformersBackend.load(str(folder), preset, device="cpu")
    yield backend
    asyncio.run(backend.close())


class Terms:
    """Operations of one forward beyond Eq. 17, by name."""

    def __init__(self, shape: TinyLlava, vocabulary: int) -> None:
        self.shape, self.vocabulary = shape, vocabulary

    def grouped_heads(self, new: int, layers: int) -> int:
        """Difference for fewer key and value heads than Eq. 17 assumes: negative, or 0."""
        shape = self.shape
        key_width = shape.hidden * shape.key_value_heads // shape.heads
        return 4 * new * shape.hidden * (key_width - shape.hidden) * layers

    def feed_forward(self, new: int, layers: int) -> int:
        """Difference for three feed-forward matrices, where Eq. 17 has two of width 4·d."""
        shape = self.shape
        return new * (6 * shape.hidden * shape.intermediate - 16 * shape.hidden**2) * layers

    def row(self, context: int) -> int:
        """The attention row: one query against all keys, at one layer."""
        return 2 * context * self.shape.hidden

    def head(self) -> int:
        """Logits of the last position."""
        return 2 * self.shape.hidden * self.vocabulary

    def decoder(self, new: int, layers: int | None = None) -> int:
        """Operations of a decoder forward besides `extension_flops`."""
        count = self.shape.layers if layers is None else layers
        return self.grouped_heads(new, count) + self.feed_forward(new, count)

    def behind_the_row(self, new: int, context: int) -> int:
        """Operations of Eq. 17 that the layer of the row skips once it has the row; negative.

        They are attention, output projection and feed-forward part.
        """
        width = self.shape.hidden
        return -(4 * new * context * width + 2 * new * width**2 + 16 * new * width**2)

    def picture(self) -> int:
        """Vision tower and projector of one picture."""
        shape = self.shape
        patches, width, outer = (shape.view_px // shape.patch_px) ** 2, shape.vision_hidden, 2
        tokens = patches + 1  # the class token
        embedding = 2 * patches * 3 * shape.patch_px**2 * width
        layer = 8 * tokens * width**2 + 4 * tokens**2 * width + 4 * tokens * outer * width**2
        projector = 2 * patches * (width * shape.hidden + shape.hidden**2)
        return embedding + shape.vision_layers * layer + projector


@pytest.fixture
def terms(shape: TinyLlava, backend: TransformersBackend) -> Terms:
    return Terms(shape, backend._adapter.output_head.out_features)


async def test_a_first_pass_is_eq_17_and_these_terms(
    backend: TransformersBackend, shape: TinyLlava, terms: Terms
) -> None:
    info = backend.info
    width, layers, visual = shape.hidden, shape.layers, info.visual_tokens
    with counted(backend) as prefix:
        view = await backend.open_view(picture(0, info.view))
    with counted(backend) as question:
        first = await backend.first_pass(view, GenerationRequest(QUESTION, max_new_tokens=1))
    shared = view.prefixes[""].length
    text = first.context_tokens - shared

    assert prefix.get_total_flops() == (
        extension_flops(0, shared, width, layers) + terms.decoder(shared) + terms.picture()
    )
    assert question.get_total_flops() == (
        extension_flops(shared, text, width, layers)
        + terms.decoder(text)
        + terms.row(first.context_tokens)
        + terms.head()
    )

    # The same against Eq. 17 for the visual tokens alone.
    in_text = flops(first.context_tokens, width, layers) - flops(visual, width, layers)
    # The view's tokens are computed before the question is known and do not attend to it. Eq. 17
    # counts attention from every token to every token, as without a causal mask.
    not_attended = 4 * shared * text * width * layers
    executed = prefix.get_total_flops() + question.get_total_flops()
    assert executed - flops(visual, width, layers) == (
        in_text
        - not_attended
        + terms.grouped_heads(first.context_tokens, layers)
        + terms.feed_forward(first.context_tokens, layers)
        + terms.row(first.context_tokens)
        + terms.head()
        + terms.picture()
    )
    if shape is AS_IN_EQ_17:
        assert terms.grouped_heads(1, 1) == terms.feed_forward(1, 1) == 0
    else:
        assert terms.grouped_heads(1, 1) < 0 < terms.feed_forward(1, 1)
    await backend.release(view)


async def test_a_retransmitted_question_is_what_the_engine_accounts_for_and_these_terms(
    backend: TransformersBackend, shape: TinyLlava, terms: Terms
) -> None:
    """Prefills and decoding; a map of a new view; two answers of several tokens."""
    info, tokens = backend.info, 4

    async def fetch(need: RegionNeed):
        return picture(1, Size(40, 40))

    engine = Engine(backend=backend, policy=AlwaysPolicy(), max_new_tokens=tokens)
    with counted(backend) as executed:
        view = await backend.open_view(picture(0, info.view))
        outcome = await engine.answer(view, SOURCE, GenerationRequest(QUESTION), fetch)
    first, second, work = outcome.first, outcome.second, outcome.work
    assert second is not None
    shared = view.prefixes[""].length
    generic = work.prefilled_tokens - first.prefilled_tokens - second.prefilled_tokens
    steps = len(first.token_ids) + len(second.token_ids) - 2
    assert first.prefilled_tokens == first.context_tokens  # the prefix is counted with it
    assert steps > 0

    # `Work` counts the view's prefix and the question as one prefill.
    question = first.context_tokens - shared
    in_two_parts = -4 * shared * question * shape.hidden * shape.layers
    # `Work` leaves out later layers too. It counts the layer of the row in full, but only queries,
    # keys and values are computed there.
    read = LAYER + 1
    generic_terms = (
        terms.grouped_heads(generic, read)
        + terms.feed_forward(generic, read - 1)
        + terms.behind_the_row(generic, shared + generic)
        + terms.row(shared + generic)
    )
    prefilled = first.prefilled_tokens + second.prefilled_tokens
    assert executed.get_total_flops() - work.flops == (
        in_two_parts
        + terms.decoder(prefilled + steps)
        + terms.row(first.context_tokens)
        + generic_terms
        + terms.head() * (steps + 2)
        + terms.picture() * 2
    )
    await backend.release(view)


# ---- the command -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "save"),
    [
        ("llava", save_tiny_llava),
        ("instructblip", save_tiny_instructblip),
        ("qwen2.5-vl", save_tiny_qwen),
    ],
)
async def test_the_command_predicts_the_engine_s_operations(
    family: str,
    save: Callable[[Path], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command, without weights, gives the exact number of operations."""
    folder = save(tmp_path)
    preset = preset_for_family(family).with_overrides(layer=LAYER)
    backend = TransformersBackend.load(str(folder), preset, device="cpu")

    async def fetch(need: RegionNeed):
        return picture(1, Size(40, 40))

    engine = Engine(backend=backend, policy=AlwaysPolicy(), max_new_tokens=4)
    view = await backend.open_view(picture(0, backend.info.view))
    outcome = await engine.answer(view, SOURCE, GenerationRequest(QUESTION), fetch)
    assert outcome.second is not None
    answers = len(outcome.first.token_ids), len(outcome.second.token_ids)
    assert answers == (4, 4)
    question = outcome.first.context_tokens - len(backend._adapter.prompts.shared().ids)
    await backend.close()

    (folder / "model.safetensors").unlink()
    (entry,) = (p for p in _entry_points() if p.name == "flops")
    command = entry.load()
    asked = {"question_tokens": question, "answer_tokens": 4, "layer": LAYER}
    command(str(folder), **asked, json_output=True)
    printed = json.loads(capsys.readouterr().out)
    assert printed["total"] + printed["decoding"] == outcome.work.flops
    info = backend.info
    equation = (info.visual_tokens, info.hidden_size, info.layers)
    assert printed["eq_18_first_pass"] == flops(*equation)
    assert printed["eq_20_total"] == total_flops(*equation, retransmitted=True)
    command(str(folder), **asked)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert lines[3].split()[-1] == f"{printed['eq_20_total'] / 1e9:,.3f}"


def test_a_7b_model_costs_half_of_what_eq_20_says() -> None:
    shape = Shape(
        visual_tokens=576, hidden_size=4096, layers=32, read_layers=15, prefix_tokens=581,
        local_tokens=576, generic_tokens=20, shared=True,
    )  # fmt: skip
    costs = costs_of(shape, 20, 1)
    assert costs.eq_18_first_pass == (24 * 576 * 4096**2 + 4 * 576**2 * 4096) * 32
    assert 3.9 < costs.eq_20_total / costs.eq_18_first_pass < 4.2
    assert costs.decoding == 0
    assert costs.ratio == pytest.approx(1.9, abs=0.05)
    # If the picture's tokens depend on the question, the generic instruction prefills them too.
    apart = costs_of(replace(shape, shared=False), 20, 1)
    assert apart.generic_instruction == extension_flops(0, 601, 4096, 15)
    assert apart.first_pass == costs.first_pass


def test_a_layer_that_does_not_exist_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"layer 9 does not exist: .* 0 to 3"):
        shape_of(str(folder), preset_named("llava-1.5").with_overrides(layer=9))


def test_another_preset_and_prompt_are_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (config_folder() / "models" / "llava-1.5.yaml").read_text(encoding="utf-8")
    mine = tmp_path / "mine.yaml"
    mine.write_text(text.replace("layer: 14", "layer: 2"), encoding="utf-8")

    def counted_by(*more: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as ended:
            main(["flops", str(folder), "--preset", str(mine), "--json", *more])
        assert ended.value.code == 0
        printed: dict[str, Any] = json.loads(capsys.readouterr().out)
        return printed

    plain = counted_by("--fit", "pad")
    assert plain["read_layers"] == 3
    assert counted_by("--prompt", "vicrop")["generic_tokens"] > plain["generic_tokens"]
    with pytest.raises(ConfigError, match=r"for the family 'qwen2\.5-vl', but"):
        shape_of(str(folder), preset_named("qwen2.5-vl"))


def _entry_points() -> list[EntryPoint]:
    """Entry points as the package declares them; an older installation may not have them yet."""
    project = tomllib.loads(_PROJECT.read_text())["project"]
    group = "vlm_collab.commands"
    return [
        EntryPoint(name, value, group) for name, value in project["entry-points"][group].items()
    ]
