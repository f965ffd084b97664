"""What a run does with its samples: one interface, so that one loop runs every method."""

from __future__ import annotations

import contextlib
import logging
import time
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from PIL.Image import Image

from edge_client.picture import Picture
from eval.analysis.records import Record, truth_text
from eval.tasks.base import Sample, Task
from vlm_collab.errors import CollabError
from vlm_collab.pictures.images import Codec

REFERENCE_QUALITY = 100
"""Quality of the JPEG that relative cost refers to (Song and Kim, *Collaborative Edge-to-Server
Inference for Vision-Language Models*, 2025, arXiv 2512.16349, section VII-F)."""

_KEPT_PICTURES = 8
"""Questions about one picture mostly follow each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Codecs:
    """How pictures are encoded.

    Attributes:
        view, region: of the global and the local view.
        view_quality, region_quality: 1 to 100.
    """

    view: Codec
    view_quality: int
    region: Codec
    region_quality: int

    def describe(self) -> dict[str, Any]:
        """As `run.json` has it."""
        return {
            "view": [self.view.name.lower(), self.view_quality],
            "region": [self.region.name.lower(), self.region_quality],
        }


class SampleError(Exception):
    """A sample cannot be worked on; says why in one line."""


@dataclass(slots=True, eq=False)
class EdgeSample:
    """One sample and its picture.

    Attributes:
        index: of the sample in its task.
        sample: of the task.
        picture: its original.
        edge_s: time spent at the edge so far.
    """

    index: int
    sample: Sample
    picture: Picture
    edge_s: float = 0.0

    @contextlib.contextmanager
    def at_the_edge(self) -> Iterator[None]:
        """Counts the time of what runs within."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.edge_s += time.perf_counter() - begin

    def facts(self) -> dict[str, Any]:
        """The columns of its row that no method has a part in."""
        sample, box = self.sample, self.sample.true_box
        return {
            "index": self.index,
            "id": sample.id,
            "image_id": sample.image_id,
            "question": sample.question,
            "category": sample.category,
            "truth": truth_text(sample.truth),
            "true_box": [] if box is None else list(box),
            "source_width": self.picture.size.width,
            "source_height": self.picture.size.height,
            "original_bytes": self.picture.original_bytes or 0,
        }


@dataclass(slots=True, eq=False)
class EncodedSample:
    """A sample whose picture is encoded.

    Attributes:
        asked: the sample.
        picture: what the edge sends, encoded.
        shown: `picture`, decoded as the server decodes it.
        reference_bytes: size of the global view as JPEG of `REFERENCE_QUALITY`.
    """

    asked: EdgeSample
    picture: bytes
    shown: Image
    reference_bytes: int


class Method(ABC):
    """One way to answer the questions of a benchmark. Make it, `open` it, use it, `close` it.

    Attributes:
        name: as in `run.json`.
        group: samples that are worked on together; known once it is open.
    """

    name: ClassVar[str]
    group: int

    @abstractmethod
    async def open(self) -> None:
        """Load what is needed.

        Raises:
            CollabError: it cannot be done; one line.
        """

    @abstractmethod
    async def close(self) -> None:
        """Free it."""

    @abstractmethod
    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of the model and of the codecs, as `run.json` has them. Once it is open."""

    @abstractmethod
    def prepare(self, index: int, sample: Sample) -> Any:
        """What the edge does before anything is sent. Runs on a thread of its own.

        Raises:
            SampleError: nothing can be sent.
        """

    @abstractmethod
    async def answer(self, ready: Sequence[Any]) -> list[Record | SampleError]:
        """Both passes, or whatever the method has, for samples that were prepared; in order."""


@dataclass(slots=True)
class PictureCache:
    """Originals by their image id: one that several questions are about is decoded once."""

    _kept: OrderedDict[str, Picture] = field(default_factory=OrderedDict)

    def get(self, sample: Sample) -> Picture:
        """The sample's picture.

        Raises:
            SampleError: it cannot be had.
        """
        if sample.image_id not in self._kept:
            self._kept[sample.image_id] = as_sample_error(
                "the picture", lambda: Picture.open(sample.picture())
            )
            while len(self._kept) > _KEPT_PICTURES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(sample.image_id)
        return self._kept[sample.image_id]


def as_sample_error(what: str, work: Callable[[], Any]) -> Any:
    """Do what may fail by a sample's fault.

    Raises:
        SampleError: it did.
    """
    try:
        return work()
    # Readers of data sets raise whatever the file formats below them do.
    except Exception as error:
        raise SampleError(f"{what}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """An error for people; one that is none of this project's names its kind."""
    line = " ".join(str(error).split())[:300]
    return line if isinstance(error, CollabError) else f"{type(error).__name__}: {line}"


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores answers by the task's default rule."""

    task: Task

    def __call__(self, text: str, sample: Sample) -> float:
        return float(self.task.scorers[self.task.default_scorer](text, sample.truth))


@contextlib.contextmanager
def quiet_engine() -> Iterator[None]:
    """Failures of single questions are told in `failed.jsonl`; their traces stay out of the
    terminal."""
    log = logging.getLogger("server_plugin")
    silent = logging.NullHandler()
    log.addHandler(silent)
    before, log.propagate = log.propagate, False
    try:
        yield
    finally:
        log.removeHandler(silent)
        log.propagate = before
