"""The interface of methods that a run can measure, and what they share."""

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
"""Quality of the JPEG to which costs are relative (Song and Kim, *Collaborative Edge-to-Server
Inference for Vision-Language Models*, 2025, arXiv 2512.16349, section VII-F)."""

_KEPT_PICTURES = 8
"""Number of decoded pictures kept; questions about one picture are mostly adjacent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Codecs:
    """How pictures are encoded.

    Attributes:
        view, region: codec of the global and the local view.
        view_quality, region_quality: their quality, 1 to 100.
    """

    view: Codec
    view_quality: int
    region: Codec
    region_quality: int

    def describe(self) -> dict[str, Any]:
        """The codecs' entry in `run.json`."""
        return {
            "view": [self.view.name.lower(), self.view_quality],
            "region": [self.region.name.lower(), self.region_quality],
        }


class SampleError(Exception):
    """A sample cannot be answered; the message gives the reason in one line."""


@dataclass(slots=True, eq=False)
class EdgeSample:
    """A sample with its picture, as the edge has it.

    Attributes:
        index: position of the sample in its task.
        sample: the sample.
        picture: the original.
        edge_s: seconds spent at the edge so far.
    """

    index: int
    sample: Sample
    picture: Picture
    edge_s: float = 0.0

    @contextlib.contextmanager
    def at_the_edge(self) -> Iterator[None]:
        """Add the time of the `with` block to `edge_s`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.edge_s += time.perf_counter() - begin

    def facts(self) -> dict[str, Any]:
        """The columns of the sample's row that do not depend on the method."""
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
        edge_sample: the sample.
        picture: what the edge sends, encoded.
        shown: `picture`, decoded as the server decodes it.
        reference_bytes: size of the global view as JPEG of `REFERENCE_QUALITY`.
    """

    edge_sample: EdgeSample
    picture: bytes
    shown: Image
    reference_bytes: int


class Method(ABC):
    """A way to answer the questions of a benchmark. Call `open` first and `close` last.

    Attributes:
        name: name in `run.json`.
        group: number of samples that run together; known once the method is open.
    """

    name: ClassVar[str]
    group: int

    @abstractmethod
    async def open(self) -> None:
        """Load the model or connect to the service.

        Raises:
            CollabError: this fails; one line.
        """

    @abstractmethod
    async def close(self) -> None:
        """Free the method's resources."""

    @abstractmethod
    def describe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The entries of the model and of the codecs in `run.json`; only after `open`."""

    @abstractmethod
    def prepare(self, index: int, sample: Sample) -> Any:
        """Do the edge's work before anything is sent. Runs on a separate thread.

        Raises:
            SampleError: the sample's picture cannot be read or encoded.
        """

    @abstractmethod
    async def answer(self, ready: Sequence[Any]) -> list[Record | SampleError]:
        """Answer prepared samples; results are in their order."""


@dataclass(slots=True)
class SamplePictures:
    """Cache of originals by image id, so that a picture with several questions is decoded once."""

    _kept: OrderedDict[str, Picture] = field(default_factory=OrderedDict)

    def get(self, sample: Sample) -> Picture:
        """Return the sample's picture.

        Raises:
            SampleError: it cannot be read.
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
    """Call `work`, and turn any error into a `SampleError`.

    Args:
        what: what is worked on, for the message.
        work: the call.

    Raises:
        SampleError: `work` raised an exception.
    """
    try:
        return work()
    # Readers of data sets pass on any exception of the file formats below them.
    except Exception as error:
        raise SampleError(f"{what}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """Format an error in one line; an error from outside this project names its type."""
    line = " ".join(str(error).split())[:300]
    return line if isinstance(error, CollabError) else f"{type(error).__name__}: {line}"


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores answers by the task's default scorer."""

    task: Task

    def __call__(self, text: str, sample: Sample) -> float:
        return float(self.task.scorers[self.task.default_scorer](text, sample.truth))


@contextlib.contextmanager
def quiet_engine() -> Iterator[None]:
    """Keep the server's log out of the terminal; failed questions are listed in `failed.jsonl`."""
    log = logging.getLogger("server_plugin")
    silent = logging.NullHandler()
    log.addHandler(silent)
    before, log.propagate = log.propagate, False
    try:
        yield
    finally:
        log.removeHandler(silent)
        log.propagate = before
