"""The demo model: it loads, it is small, it reads signs, and its figures are reproducible."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration

from eval.demo_model import loop, train
from eval.demo_model.build import build_model
from eval.demo_model.decoder import train_decoder
from eval.demo_model.evaluate import run
from eval.demo_model.export import FOLDER, curve, hub_name, write_checkpoint
from eval.demo_model.measure import Reader
from eval.demo_model.optim import make_optimisers, rate_at
from eval.demo_model.packing import decoder_batch, tree_mask, vocabulary
from eval.demo_model.questions import settings_of
from eval.demo_model.recipe import TrainingStage, load_recipe
from eval.demo_model.report import report
from eval.demo_model.tower import to_pixels
from eval.demo_model.views import IGNORE, full_window, patch_labels, tower_batch
from eval.demo_model.words import GENERIC, IMAGE, build_tokenizer
from eval.demo_model.workers import load_model
from eval.signs.drawing import render_view
from eval.signs.sampling import generate_scene, questions
from eval.signs.scenes import SceneStyle

RECIPE = Path(__file__).parents[2] / "eval" / "demo_model" / "recipe.yaml"
RESULTS = Path(__file__).parents[2] / "docs" / "results" / "demo-model.json"
BENCHMARK = RESULTS.with_name("demo-model-2000.json")
QUESTION = "what number is on the red circle?"


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return load_model()


# --- the checkpoint folder -------------------------------------------------------------------


def test_checkpoint_loads_without_missing_or_unexpected_keys() -> None:
    _, info = LlavaForConditionalGeneration.from_pretrained(FOLDER, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not info["error_msgs"]


def test_folder_is_small() -> None:
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 12_000_000


def test_weights_have_the_hub_names_in_bfloat16() -> None:
    with safe_open(FOLDER / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        dtypes = {file.get_slice(name).get_dtype() for name in names}
    assert dtypes == {"BF16"}
    assert {
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.lm_head.weight",
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.5.mlp.fc2.bias",
        "vision_tower.vision_model.post_layernorm.weight",
        "multi_modal_projector.linear_1.weight",
        "multi_modal_projector.linear_2.bias",
    } <= names
    roots = {name.split(".")[0] for name in names}
    assert roots == {"language_model", "vision_tower", "multi_modal_projector"}


def test_unknown_parameter_has_no_hub_name() -> None:
    with pytest.raises(ValueError, match="heads"):
        hub_name("heads.weight")


def test_export_keeps_the_logits(tmp_path: Path) -> None:
    """The exported checkpoint gives the same logits as the model in memory."""
    torch.manual_seed(0)
    recipe = load_recipe(RECIPE)
    made = build_model(recipe)
    for parameter in made.parameters():  # the file holds bfloat16
        parameter.data = parameter.data.bfloat16().float()
    made.train(False)
    write_checkpoint(recipe, made.state_dict(), tmp_path)
    loaded = load_model(tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    inputs = processor(
        images=[render_view(generate_scene("val", 0, size=(448, 448)))],
        text=f"USER: <image>\n{QUESTION} ASSISTANT:",
        return_tensors="pt",
    )
    with torch.no_grad():
        torch.testing.assert_close(made(**inputs).logits, loaded(**inputs).logits, rtol=0, atol=0)


def test_processor_is_a_llava_processor_that_stretches() -> None:
    processor = AutoProcessor.from_pretrained(FOLDER)
    assert type(processor).__name__ == "LlavaProcessor"
    noise = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    wide = Image.fromarray(noise).resize((300, 200))
    inputs = processor(
        images=[Image.fromarray(noise), wide],
        text=f"USER: <image><image>\n{QUESTION} ASSISTANT:",
        return_tensors="pt",
    )
    assert inputs.pixel_values.shape == (2, 3, 112, 112)
    torch.testing.assert_close(
        inputs.pixel_values[:1], to_pixels(noise[None], torch.device("cpu")), rtol=0, atol=1e-6
    )
    words = vocabulary()
    expected = [*words.prefix(), *[IMAGE] * 128, *words.suffix(QUESTION)]
    assert inputs.input_ids[0].tolist() == expected


def test_chat_template_gives_the_prompt() -> None:
    processor = AutoProcessor.from_pretrained(FOLDER)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    assert text == f"USER: <image>\n{QUESTION} ASSISTANT:"


# --- words -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["47", "Wie viel kostet das? 3,50 €", "漢字 🙂 tabs\tand\nlines", "007", GENERIC]
)
def test_any_text_survives_encoding_and_decoding(text: str) -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text


def test_digits_never_merge() -> None:
    words = vocabulary()
    for number in range(100):
        assert len(words.plain(f"{number:02d}")) == 2


def test_committed_tokenizer_is_the_one_the_code_builds() -> None:
    built = json.loads(build_tokenizer().backend_tokenizer.to_str())
    assert json.loads((FOLDER / "tokenizer.json").read_text()) == built


# --- training parts --------------------------------------------------------------------------


def test_batches_depend_on_seed_and_step_only() -> None:
    one, two = (tower_batch(3, 7, 4, 0.5, 0.0) for _ in range(2))
    np.testing.assert_array_equal(one.views, two.views)
    np.testing.assert_array_equal(one.digits, two.digits)
    first, second = (decoder_batch(3, 7, 2, 0.5, 0.0) for _ in range(2))
    np.testing.assert_array_equal(first.views, second.views)
    np.testing.assert_array_equal(first.ids, second.ids)


def test_patch_labels_name_the_sign_under_the_patch() -> None:
    for index in range(30):
        scene = generate_scene("val", index, style=SceneStyle(two_digits=0.5))
        labels = patch_labels(scene, full_window(scene))
        for sign in scene.signs:
            column, row = (int(v // 112) for v in sign.centre)
            patch = row * 8 + column
            covered = sign.diameter_px > 160  # such a sign fills the patch under its centre
            if covered:
                assert labels.sign[patch] == 1
                assert labels.digits[patch, 0] == int(sign.text[0])
        assert (labels.colour[labels.sign == 0] == IGNORE).all()


def test_packed_branches_compute_the_same_as_single_prompts() -> None:
    """The tree mask and the positions of packed training are those of single prompts."""
    torch.manual_seed(0)
    made = build_model(load_recipe(RECIPE))
    made.train(False)
    batch = decoder_batch(5, 0, 1, 0.5, 0.0)
    language = made.model.language_model
    embeds = torch.randn(1, batch.ids.shape[1], 192)
    with torch.no_grad():
        packed = language(
            inputs_embeds=embeds,
            attention_mask=torch.from_numpy(tree_mask(batch.branch)),
            position_ids=torch.from_numpy(batch.positions),
            use_cache=False,
        ).last_hidden_state[0]
        for branch in range(1, int(batch.branch.max()) + 1):
            own = np.flatnonzero((batch.branch[0] == 0) | (batch.branch[0] == branch))
            alone = language(inputs_embeds=embeds[:, own], use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(packed[own], alone, rtol=1e-4, atol=1e-4)


def test_every_branch_asks_once_and_answers_to_the_end_token() -> None:
    batch = decoder_batch(6, 0, 2, 1.0, 0.0)
    end = vocabulary().tokenizer.eos_token_id
    for row in range(2):
        for branch in range(1, int(batch.branch[row].max()) + 1):
            labels = batch.labels[row][batch.branch[row] == branch]
            counted = labels[labels != IGNORE]
            assert len(counted) >= 2
            assert counted[-1] == end


def test_learning_rate_rises_stays_and_falls() -> None:
    rates = [rate_at(step, 1000, 1.0) for step in range(1000)]
    assert rates[0] < 0.05
    assert rates[100] == rates[499] == 1.0
    assert rates[750] == pytest.approx(0.5)
    assert rates[-1] <= 0.011


def test_training_continues_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage that is killed and started again ends with the weights of an uninterrupted one."""
    monkeypatch.setattr(loop, "_SAVE_EVERY_S", -1.0)  # save after every step
    stage = TrainingStage("tiny", "tower", steps=30, batch=1, learning_rate=0.01, seed=0)

    def finish(
        folder: Path, stop_before: int | None, stage: TrainingStage = stage
    ) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 2)
        working = loop.TrainingRun(folder, torch.device("cpu"), workers=1)

        def batches(first: int) -> Iterator[torch.Tensor]:
            for step in range(first, stage.steps):
                if step == stop_before:
                    raise KeyboardInterrupt
                yield torch.full((4, 3), float(step % 5))

        def loss_of(batch: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
            return model(batch).float().square().mean(), {}

        loop.train_loop(
            working,
            stage,
            model,
            make_optimisers([model], [model], stage.learning_rate),
            batches,
            loss_of,
            lambda: {"first": 0.0},
        )
        weights: dict[str, torch.Tensor] = working.load(working.finished("tiny"))["model"]
        return weights

    unbroken = finish(tmp_path / "a", None)
    with pytest.raises(KeyboardInterrupt):
        finish(tmp_path / "b", 13)
    with pytest.raises(ValueError, match="the recipe of tiny changed after training began"):
        finish(tmp_path / "b", None, msgspec.structs.replace(stage, steps=40))
    resumed = finish(tmp_path / "b", None)
    for name, value in unbroken.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)
    steps = [json.loads(line)["step"] for line in (tmp_path / "b/curve.jsonl").open()]
    assert steps == sorted(steps)


def test_errors_in_a_recipe_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "recipe.yaml"
    bad.write_text("vision: {}\ntext: {}\nstages:\n  - {name: one, kind: tower, stepz: 3}\n")
    with pytest.raises(ValueError, match=r"recipe\.yaml: stage 'one'.*stepz"):
        load_recipe(bad)
    with pytest.raises(ValueError, match="no stage 'nine'"):
        load_recipe(RECIPE).stage("nine")
    stage = "{name: one, kind: tower, steps: 3, batch: 2, learning_rate: 1.0e-3, seed: 1}"
    for right, wrong in (
        ("kind: tower", "kind: towr"),
        ("1.0e-3", "1e-3"),
        ("steps: 3", "steps: x"),
    ):
        text = f"vision: {{}}\ntext: {{}}\nstages:\n  - {stage}\n"
        bad.write_text(text)
        assert load_recipe(bad).stage("one").learning_rate == 1e-3
        bad.write_text(text.replace(right, wrong))
        with pytest.raises(ValueError, match=r"recipe\.yaml: stage 'one'"):
            load_recipe(bad)


def test_a_decoder_without_a_tower_is_refused(tmp_path: Path) -> None:
    recipe = load_recipe(RECIPE)
    stage = msgspec.structs.replace(recipe.stage("decoder-1"), start_from=())
    with pytest.raises(ValueError, match="'decoder-1' needs a tower stage"):
        train_decoder(loop.TrainingRun(tmp_path, torch.device("cpu"), 1), recipe, stage)


def test_an_unknown_last_stage_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train", "--out", str(tmp_path), "--until", "nine"])
    with pytest.raises(SystemExit):
        train.main()
    assert "no stage 'nine'" in capsys.readouterr().err


def test_jitter_is_applied_in_both_kinds_of_stage() -> None:
    plain, shaken = (decoder_batch(5, 1, 4, 1.0, 0.0, 1.75, jitter) for jitter in (0.0, 0.25))
    for view in range(3):  # the global view and both local ones
        assert not np.array_equal(plain.views[:, view], shaken.views[:, view])
    first, second = (tower_batch(5, 1, 8, 1.0, 0.0, 1.0, jitter) for jitter in (0.0, 0.25))
    assert not np.array_equal(first.views, second.views)


def test_the_curve_of_a_checkpoint_ends_with_its_stage(tmp_path: Path) -> None:
    stages = ("tower-1", "decoder-1", "tower-2")
    points = [{"stage": stage, "step": 1, "val_sign": 0.1} for stage in stages]
    (tmp_path / "curve.jsonl").write_text("".join(json.dumps(p) + "\n" for p in points))
    assert curve(tmp_path, stages[:2]) == points[:2]


# --- abilities -------------------------------------------------------------------------------


def test_reader_agrees_with_generate(model: LlavaForConditionalGeneration) -> None:
    """The batched reader gives the same tokens and min-entropy as `generate` on the same view."""
    scene = generate_scene("val", 1)
    view, asked = render_view(scene), questions(scene)[0]
    reader = Reader(model)
    reading = reader.read(reader.features([view]), [asked.text])[0]
    processor = AutoProcessor.from_pretrained(FOLDER)
    inputs = processor(
        images=[view], text=f"USER: <image>\n{asked.text} ASSISTANT:", return_tensors="pt"
    )
    out = model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=5,
        output_scores=True,
        return_dict_in_generate=True,
    )
    new = out.sequences[0, inputs.input_ids.shape[1] :]
    assert processor.tokenizer.decode(new, skip_special_tokens=True) == reading.text
    bits = [-float(s[0].double().softmax(-1).max().log2()) for s in out.scores]
    np.testing.assert_allclose(bits, reading.min_entropy, atol=1e-4)


def test_the_model_s_own_regions_improve_its_answers(model: LlavaForConditionalGeneration) -> None:
    """On 40 held-out scenes, clearly more answers are right with the model's own regions."""
    from dataclasses import replace

    committed = json.loads(RESULTS.read_text())["test"]
    outcomes = run(model, replace(settings_of(committed["settings"]), count=40))
    first = sum(o.right("first") for o in outcomes)
    own = sum(o.right("own") for o in outcomes)
    assert own - first >= 4
    # At least the committed accuracy minus three standard deviations of 40 draws.
    expected = committed["accuracy"]["own"]
    assert own / 40 >= expected - 3 * (expected * (1 - expected) / 40) ** 0.5 - 0.01


@pytest.mark.slow
@pytest.mark.parametrize("split", ["test", "val"])
def test_committed_figures_are_reproduced(
    model: LlavaForConditionalGeneration, split: str, request: pytest.FixtureRequest
) -> None:
    """The committed command gives the committed counts.

    Scenes and weights are the same bits everywhere, but float32 sums differ in their last bits
    between processors, which can change a close answer, so two may differ.
    """
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("takes minutes; run with -m slow")
    committed = json.loads(RESULTS.read_text())[split]
    settings = settings_of(committed["settings"])
    figures = report(run(model, settings), settings)
    for which, right in committed["right"].items():
        assert abs(figures["right"][which] - right) <= 2
    assert figures["auroc"]["min_entropy/full"] == pytest.approx(
        committed["auroc"]["min_entropy/full"], abs=0.01
    )


@pytest.mark.slow
@pytest.mark.parametrize("split", ["test", "val"])
def test_committed_answers_are_reproduced(
    model: LlavaForConditionalGeneration, split: str, request: pytest.FixtureRequest
) -> None:
    """The first 200 questions of the benchmark style, one by one; two answers may differ."""
    from dataclasses import replace

    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("takes minutes; run with -m slow")
    committed = json.loads(BENCHMARK.read_text())[split]
    outcomes = run(model, replace(settings_of(committed["settings"]), count=200))
    for which, marks in committed["right_by_question"].items():
        turned = [o.right(which) != (m == "1") for o, m in zip(outcomes, marks, strict=False)]
        assert sum(turned) <= 2
