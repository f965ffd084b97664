"""Prometheus metrics of one service, in their own registry.

FLOPs are counted by Eq. 17 of Song and Kim, *Collaborative Edge-to-Server Inference for
Vision-Language Models* (2025, arXiv 2512.16349).
"""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    generate_latest,
)

from vlm_collab.method.cost import ByteCounter

STAGE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
UNCERTAINTY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class Metrics:
    """The service's counters and histograms. Units are in the names."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.questions = Counter(
            "vlm_collab_questions",
            "Questions ended, by outcome: first, second, fallback_<reason>, refused, lost.",
            ["outcome"],
            registry=r,
        )
        self.refusals = Counter(
            "vlm_collab_refusals", "Questions refused, by error code.", ["code"], registry=r
        )
        self.retransmissions = Counter(
            "vlm_collab_retransmissions",
            "Questions for which a region was requested; divided by vlm_collab_questions_total: "
            "the retransmission rate.",
            registry=r,
        )
        self.bytes = Counter(
            "vlm_collab_bytes",
            "Bytes of messages, WebSocket headers included, and of HTTP bodies, by kind and "
            "direction (up: from the edge).",
            ["kind", "direction"],
            registry=r,
        )
        self.uncertainty = Histogram(
            "vlm_collab_first_uncertainty",
            "Aggregated uncertainty of first answers, in the unit of the policy's metric.",
            buckets=UNCERTAINTY_BUCKETS,
            registry=r,
        )
        self.stage = Histogram(
            "vlm_collab_stage_seconds",
            "Time of a stage: queue, first, region (waiting for the edge), second.",
            ["stage"],
            buckets=STAGE_BUCKETS_S,
            registry=r,
        )
        self.flops = Counter(
            "vlm_collab_decoder_flops",
            "Decoder FLOPs executed, by Eq. 17 of Song and Kim (arXiv 2512.16349).",
            registry=r,
        )
        self._info = Info("vlm_collab_model", "The model served.", registry=r)

    def model(self, name: str, version: str) -> None:
        """Publish the name of the model and the version of the server."""
        self._info.info({"model": name, "version": version})

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Publish a number that is read at each scrape."""
        Gauge(f"vlm_collab_{name}", text, registry=self.registry).set_function(value)

    def traffic(self, counter: ByteCounter, published: dict[tuple[str, str], int]) -> None:
        """Publish a connection's bytes since `published`, and update that."""
        for direction, kinds in counter.snapshot().items():
            for kind, size in kinds.items():
                new_bytes = size - published.get((kind, direction), 0)
                if new_bytes:
                    self.bytes.labels(kind, direction).inc(new_bytes)
                    published[kind, direction] = size

    def text(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)
