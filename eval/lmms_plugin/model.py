# mypy: disable-error-code="import-not-found,import-untyped,misc"
"""The model behind `python -m lmms_eval --model vlm_collab`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm

from eval.lmms_plugin.figures import Totals, all_figures, sum_totals, totals_of
from eval.lmms_plugin.in_process import InProcess
from eval.lmms_plugin.originals import originals_of
from eval.lmms_plugin.over_service import ServiceSource
from eval.lmms_plugin.questions import LmmsQuestion, questions_of
from eval.lmms_plugin.runner import AnswerSource, CostedAnswer, TimedAnswers, answer_all
from eval.lmms_plugin.settings import settings_from
from eval.runs.methods.method import SampleError
from vlm_collab.errors import CollabError, ConfigError


@contextlib.contextmanager
def _one_line() -> Iterator[None]:
    """End the program with one line and exit code 1.

    lmms-eval catches every other exception, prints a traceback, and ends with exit code 0.
    """
    try:
        yield
    except CollabError as error:
        raise SystemExit(f"vlm_collab: {error}") from None
    except KeyboardInterrupt:
        logger.error("vlm_collab: stopped")
        raise SystemExit(130) from None


class VlmCollab(lmms):
    """A model of lmms-eval that sends a view first, and a region only when unsure.

    Args:
        arguments: see `eval.lmms_plugin.settings.Settings`.

    Raises:
        SystemExit: an option is wrong, or the service cannot be reached; one line.
    """

    is_simple = True

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        with _one_line():
            self._settings = settings_from(arguments)
            self._totals: dict[str, Totals] = {}
            self._seconds = 0.0
            source = self._answer_source()
            if isinstance(source, ServiceSource):
                asyncio.run(source.check())

    @property
    def device(self) -> torch.device:
        """Device of the tensors that processes exchange."""
        device: torch.device = PartialState().device
        return device

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """Answer requests, in order.

        Raises:
            SystemExit: the model or service cannot be used; one line.
        """
        with _one_line():
            questions = questions_of(requests, self._settings, logger.warning)
            if not questions:
                return []
            replies, seconds = asyncio.run(self._ask(questions))
        self._seconds += seconds
        for question, reply in zip(questions, replies, strict=True):
            if not question.padding:
                before = self._totals.get(question.task, Totals())
                self._totals[question.task] = sum_totals([before, totals_of([reply])])
        return [_result(reply) for reply in replies]

    def clean(self) -> None:
        """Pass the figures of all processes to lmms-eval's metrics hook.

        lmms-eval calls it in every process at the end, even in a process without questions, whose
        answers were all in lmms-eval's cache.
        """
        parts: list[tuple[dict[str, Totals], float]] = gather_object(
            [(self._totals, self._seconds)]
        )
        self._totals, self._seconds = {}, 0.0
        names = dict.fromkeys(name for part, _ in parts for name in part)
        tasks = {
            name: sum_totals([part[name] for part, _ in parts if name in part]) for name in names
        }
        seconds = max(took for _, took in parts)
        if tasks:
            tokens = sum(totals.decoded_tokens for totals in tasks.values())
            log_metrics(
                total_elapsed_time=seconds,
                total_gen_tokens=tokens,
                avg_speed=tokens / seconds,
                additional_metrics=all_figures(tasks),
            )
        super().clean()

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Not supported: the two stages generate answers and do not score given ones."""
        self._refuse(requests, "cannot score given answers (loglikelihood)")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Not supported: a task in rounds has no single first answer."""
        self._refuse(requests, "answers in one round only (generate_until_multi_round)")

    def generate_visual_cot(self, requests: Sequence[Any]) -> NoReturn:
        """Not supported: the model draws no pictures."""
        self._refuse(requests, "cannot draw pictures (generate_visual_cot)")

    def _refuse(self, requests: Sequence[Any], why: str) -> NoReturn:
        tasks = ", ".join(sorted({str(request.task_name) for request in requests}))
        with _one_line():
            raise ConfigError(f"{tasks}: vlm_collab {why}; choose tasks of type generate_until")
        raise AssertionError

    def _answer_source(self) -> AnswerSource:
        return (InProcess if self._settings.server is None else ServiceSource)(self._settings)

    async def _ask(self, questions: Sequence[LmmsQuestion]) -> TimedAnswers:
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(
                tqdm(total=len(questions), desc="vlm_collab", disable=self.rank != 0)
            )
            log = None
            if self._settings.log is not None:
                # Keep the lines of earlier requests of this run.
                mode = "a" if self._seconds else "w"
                log = stack.enter_context(_opened(self._settings.log, self.rank, mode))

            def done(question: LmmsQuestion, reply: CostedAnswer | SampleError) -> None:
                bar.update()
                if isinstance(reply, SampleError):
                    logger.error(f"{question.name} failed and counts as an empty answer: {reply}")
                if log is not None and not question.padding:
                    log.write(_line(question, reply) + "\n")

            return await answer_all(
                self._answer_source(),
                questions,
                lambda question: originals_of(question, self.task_dict),
                done,
            )


def _opened(path: str, rank: int, mode: str) -> Any:
    """Open the log; each process has its own."""
    name = path if rank == 0 else f"{path}.{rank}"
    try:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        return open(name, mode, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"model_args: log: {error}") from error


def _line(question: LmmsQuestion, reply: CostedAnswer | SampleError) -> str:
    line: dict[str, Any] = {"task": question.task, "doc_id": question.doc_id}
    if isinstance(reply, SampleError):
        return json.dumps({**line, "failed": str(reply)}, ensure_ascii=False)
    for name in CostedAnswer.__dataclass_fields__:
        value = getattr(reply, name)
        line[name] = value.name.lower() if hasattr(value, "name") else value
    return json.dumps(line, ensure_ascii=False)


def _result(reply: CostedAnswer | SampleError) -> GenerationResult:
    if isinstance(reply, SampleError):
        return GenerationResult(text="")
    counts = TokenCounts(input_tokens=reply.prefilled_tokens, output_tokens=reply.decoded_tokens)
    return GenerationResult(text=reply.text, token_counts=counts)
