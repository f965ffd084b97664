"""Stages of kind "decoder": train projector and language model over a frozen vision tower."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own usage)
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from eval.demo_model import optim
from eval.demo_model.build import build_model
from eval.demo_model.loop import TrainingRun, drawn_ahead, train_loop
from eval.demo_model.measure import ViewedQuestion, measure
from eval.demo_model.packing import DecoderBatch, decoder_batch, tree_mask
from eval.demo_model.recipe import Recipe, TrainingStage
from eval.demo_model.tower import to_pixels
from eval.demo_model.views import IGNORE, SIDE, random_window, view_style
from eval.demo_model.words import IMAGE
from eval.signs.drawing import draw
from eval.signs.sampling import generate_scene, questions

_VAL_SCENES = 64


def load_tower(model: LlavaForConditionalGeneration, state: dict[str, Tensor]) -> None:
    """Load the vision tower of a finished tower stage."""
    prefix = "tower."
    tower = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    model.model.vision_tower.load_state_dict(tower)


def packed_loss(
    model: LlavaForConditionalGeneration, batch: DecoderBatch, device: torch.device
) -> tuple[Tensor, dict[str, float]]:
    """Weighted next-token loss on the answers of a packed batch, and their accuracy."""
    inner = model.model
    views = batch.views.reshape(-1, SIDE, SIDE, 3)
    with torch.no_grad():
        hidden = inner.vision_tower(pixel_values=to_pixels(views, device)).last_hidden_state
    features = inner.multi_modal_projector(hidden[:, 1:])
    ids = torch.from_numpy(batch.ids).to(device)
    embeds = inner.language_model.embed_tokens(ids)
    slots = (ids == IMAGE).unsqueeze(-1).expand_as(embeds)
    embeds = embeds.masked_scatter(slots, features.to(embeds.dtype))
    states = inner.language_model(
        inputs_embeds=embeds,
        attention_mask=torch.from_numpy(tree_mask(batch.branch)).to(device),
        position_ids=torch.from_numpy(batch.positions).to(device),
        use_cache=False,
    ).last_hidden_state
    labels = torch.from_numpy(batch.labels).to(device)
    counted = labels != IGNORE
    scores = model.lm_head(states[counted]).float()
    weights = torch.from_numpy(batch.weights).to(device)[counted]
    losses = F.cross_entropy(scores, labels[counted], reduction="none")
    right = (scores.argmax(-1) == labels[counted]).float()
    loss = (losses * weights).sum() / weights.sum()
    return loss, {"token_right": float((right * weights).sum() / weights.sum())}


def validation_samples(two_digits: float) -> list[ViewedQuestion]:
    """Validation scenes, drawn fast, with one question each; only for the learning curve."""
    import numpy as np

    rng = np.random.default_rng(5)
    samples = []
    for index in range(_VAL_SCENES * 2):
        scene = generate_scene("val", index, style=view_style(two_digits, 0.0))
        choices = questions(scene)
        question = choices[index % len(choices)]
        full = draw(scene, (0.0, 0.0, 896.0, 896.0), (448, 448), exact_texture=False)
        window = random_window(rng, scene, question.sign)
        samples.append(
            ViewedQuestion(
                view=full.resize((SIDE, SIDE)),
                question=question,
                size=scene.size,
                local=draw(scene, window, (SIDE, SIDE), exact_texture=False),
            )
        )
    return samples


def train_decoder(run: TrainingRun, recipe: Recipe, stage: TrainingStage) -> None:
    """Train projector and decoder by packed question answering."""
    torch.manual_seed(stage.seed)
    model = build_model(recipe)
    if not any(recipe.stage(name).kind == "tower" for name in stage.start_from):
        raise ValueError(f"stage {stage.name!r} needs a tower stage in its start_from")
    for name in stage.start_from:
        state = run.load(run.finished(name))["model"]
        if recipe.stage(name).kind == "tower":
            tower = state
        else:
            model.load_state_dict(state)
    load_tower(model, tower)
    model.to(run.device)  # type: ignore[arg-type]
    inner = model.model
    inner.vision_tower.requires_grad_(False)
    trained: list[nn.Module] = [inner.multi_modal_projector, inner.language_model, model.lm_head]
    hidden: list[nn.Module] = [inner.multi_modal_projector, inner.language_model.layers]
    optimisers = optim.make_optimisers(trained, hidden, stage.learning_rate)

    def batches(first: int) -> Iterator[DecoderBatch]:
        return drawn_ahead(
            run.pool,
            decoder_batch,
            [(stage.seed, s, stage.batch, *stage.progress(s)) for s in range(first, stage.steps)],
        )

    def loss_of(batch: DecoderBatch) -> tuple[Tensor, dict[str, float]]:
        return packed_loss(model, batch, run.device)

    held_out = validation_samples(stage.two_digits[1])

    def evaluate() -> dict[str, float]:
        return measure(model, held_out).summary()

    train_loop(run, stage, model, optimisers, batches, loss_of, evaluate)
