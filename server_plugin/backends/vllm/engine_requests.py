"""Requests to a vLLM engine: sampling parameters, prompt with pictures, stream of outputs."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from typing import Any

from server_plugin.backends.base import Sampling
from server_plugin.backends.transformers.adapters.prompts import Prompt
from server_plugin.backends.vllm.views import NamedPicture
from vlm_collab.errors import ModelError

_ATTEMPTS = 3
"""How often a request is sent when the engine lacks a picture that vLLM's front-end left out."""


def sampling_parameters(
    sampling: Sampling,
    max_new_tokens: int,
    *,
    logprobs: int,
    end_tokens: Collection[int],
    extra_args: Mapping[str, Any] | None,
) -> Any:
    """Return vLLM's `SamplingParams` for one answer.

    Args:
        sampling: how tokens are chosen.
        max_new_tokens: longest answer, in tokens.
        logprobs: log-probabilities reported with each token; `EVERY_LOGPROB` for all.
        end_tokens: ids of the tokens that end the answer.
        extra_args: what the row capture reads; None if no attention row is wanted.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p if sampling.temperature else 1.0,
        seed=sampling.seed if sampling.temperature else None,
        max_tokens=max_new_tokens,
        logprobs=logprobs,
        # Exactly the tokens that end an answer on the Transformers backend.
        ignore_eos=True,
        stop_token_ids=sorted(end_tokens),
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
        extra_args=extra_args,
    )


async def outputs_of(
    engine: Any,
    name: str,
    prompt: Prompt,
    pictures: Sequence[NamedPicture],
    parameters: Any,
    cache_salt: str,
) -> AsyncGenerator[Any]:
    """Run a request, and yield vLLM's outputs: each holds the tokens since the one before.

    Args:
        engine: vLLM's `AsyncLLM` or engine client.
        name: of the request.
        prompt: token ids.
        pictures: in the order of the prompt's image tokens.
        parameters: see `sampling_parameters`.
        cache_salt: only requests with the same salt share cached blocks.

    Raises:
        ModelError: vLLM raised an error of its own; one line.
    """
    request: dict[str, Any] = {
        "prompt_token_ids": _collapsed(prompt),
        "cache_salt": cache_salt,
    }
    if pictures:
        request["multi_modal_data"] = {"image": [picture.image for picture in pictures]}
        # vLLM does not process a picture again whose name it knows.
        request["multi_modal_uuids"] = {"image": [picture.name for picture in pictures]}
    try:
        for attempt in range(1, _ATTEMPTS + 1):
            # vLLM processes pictures in its own threads, so the event loop is not blocked.
            (rendered,) = await engine.renderer.render_cmpl_async([request])
            stream = engine.generate(rendered, parameters, name)
            async with contextlib.aclosing(stream) as outputs:
                async for output in outputs:
                    if attempt < _ATTEMPTS and _lacks_picture(output):
                        break
                    yield output
                else:
                    return
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "vllm":
            raise
        reason = " ".join(str(error).split()) or repr(error.__cause__ or error)
        raise ModelError(f"vLLM failed: {reason[:200]}") from error


def check_prompt(prompt: Prompt, expanded: Sequence[int]) -> None:
    """Check that vLLM expanded a prompt's image tokens as the checkpoint's own processor does.

    The row capture reads a span of positions, which is the view only then.

    Raises:
        ModelError: it did not.
    """
    if tuple(expanded) != prompt.ids:
        raise ModelError(
            f"vLLM made a prompt of {len(expanded)} tokens, the checkpoint's own processor "
            f"{len(prompt.ids)}: this vLLM expands pictures in another way"
        )


def _collapsed(prompt: Prompt) -> list[int]:
    """Return the prompt with one image token for each picture; vLLM expands them again."""
    ids: list[int] = []
    start = 0
    for place in prompt.images:
        ids += prompt.ids[start : place.start + 1]
        start = place.stop
    return [*ids, *prompt.ids[start:]]


def _lacks_picture(output: Any) -> bool:
    """Whether vLLM ended a request before its first token because a picture was missing.

    vLLM's front-end leaves out pictures that it believes the engine has cached. The engine lacks
    one if the question that brought it was cancelled on the way, or if its cache was full. vLLM
    then corrects its belief, and the caller has to send the request again.
    """
    ended = output.outputs[0]
    return ended.finish_reason == "error" and not ended.token_ids
