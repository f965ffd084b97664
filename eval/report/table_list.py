"""The tables of a report: titles, explanations and columns, by file name.

Tables I-III are those of Song and Kim, *Collaborative Edge-to-Server Inference for Vision-Language
Models* (2025, arXiv 2512.16349).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from eval.report.inputs import Inputs
from eval.report.table_format import Cell, count, labelled, number, percent, ranged, word
from eval.report.tables import (
    Row,
    table1,
    table2,
    table3,
    table_baselines,
    table_boxes,
    table_chosen,
    table_layers,
    table_metrics,
    table_summaries,
)

TABLES: Mapping[str, tuple[str, Callable[[Inputs], list[Row]], str, Mapping[str, Cell]]] = {
    "table-1": (
        "Visual tokens and mean length of the input (Table I)",
        table1,
        "n_v of the model, and the mean of the columns first_input_tokens and second_input_tokens.",
        {
            "": word("pass"),
            "visual tokens": word("visual_tokens"),
            "mean input": number("mean_input_tokens", 1),
            "visual share": percent("visual_share"),
        },
    ),
    "table-2": (
        "Right and wrong first answers by metric (Table II, Eq. 23-24)",
        table2,
        "Overlap by Eq. 23, Bhattacharyya distance by Eq. 24 (natural logarithm), in 20 "
        "bins of equal width from 0 to 1 for the margin, else to the largest value; 10 "
        "and 40 bins are in report.json. The paper does not state its bins. A first "
        "answer is right if it scores at least one half. Intervals correct for the bias of these "
        "numbers, so a number may lie near an end of its interval or outside.",
        {
            "questions": word("part"),
            "metric": word("name"),
            "overlap ↓": ranged("overlap"),
            "D_B ↑": ranged("distance"),
            "AUROC ↑": number("auroc"),
            "right": word("right"),
            "wrong": word("wrong"),
        },
    ),
    "table-3": (
        "Starting token against full average, min-entropy (Table III)",
        table3,
        "As in the table above.",
        {
            "questions": word("part"),
            "aggregation": word("name"),
            "overlap ↓": ranged("overlap"),
            "D_B ↑": ranged("distance"),
            "AUROC ↑": number("auroc"),
        },
    ),
    "metrics": (
        "Area between trade-off curve and random line, by metric and aggregation",
        table_metrics,
        "Mean over all rates of accuracy minus the random line, and the same minus that "
        "of min_entropy/full, paired in each resample.",
        {
            "questions": word("part"),
            "setting": word("setting"),
            "area": ranged("area", 4),
            "minus min_entropy/full": ranged("difference", 4),
        },
    ),
    "baselines": (
        "All methods on the same samples",
        table_baselines,
        "Costs are defined in docs/evaluation.md; FLOPs are relative to those of the first "
        "passes. Empty cells are unknown.",
        {
            "method": word("name"),
            "setting": labelled("setting"),
            "accuracy": percent("accuracy"),
            "regions sent": percent("rate"),
            "pixels": number("cost_pixels"),
            "over JPEG 100": number("cost_bytes"),
            "bytes up": number("bytes_up", 0),
            "bytes down": number("bytes_down", 0),
            "FLOPs, Eq. 17-20": number("relative_paper_flops", 2),
            "FLOPs, executed": number("relative_flops", 2),
            "note": word("note"),
        },
    ),
    "chosen": (
        "Thresholds chosen on the validation split",
        table_chosen,
        "η is chosen on the validation run alone. Loss is the accuracy of full "
        "retransmission minus that of the policy.",
        {
            "chosen for": word("name"),
            "η": number("eta", 4),
            "rate, val": percent("val_rate"),
            "rate": percent("rate"),
            "accuracy, val": percent("val_accuracy"),
            "accuracy": percent("accuracy"),
            "loss against full": percent("loss"),
            "bytes up": number("bytes_up", 0),
        },
    ),
    "boxes": (
        "Regions against random regions, and the gain of second answers",
        table_boxes,
        "Share of the true box's area that lies in the region, and its expectation for a random "
        "place of the region, over questions with a true box; score of the second minus the first "
        "answer, over all questions.",
        {
            "questions": word("part"),
            "n": count,
            "with a box": word("with_box"),
            "covers the true place": percent("covered"),
            "at random": percent("covered_at_random"),
            "difference": percent("difference"),
            "second minus first answer": percent("gain"),
            "improved": word("improved"),
            "worsened": word("worsened"),
        },
    ),
    "summaries": (
        "The task's own figures",
        table_summaries,
        "Computed by the task's summaries (docs/tasks.md).",
        {
            "run": word("run"),
            "figure": word("summary"),
            "of": word("of"),
            "first": number("first"),
            "second": number("second"),
        },
    ),
    "layers": (
        "Attention layers, on the validation split",
        table_layers,
        "Share of the true box in the layer's region, from the engine's first pass and region "
        "search. The rows are in the Parquet file beside the calibration.",
        {
            "layer": word("layer"),
            "covers the true place": percent("covered"),
            "holds all of it": percent("whole"),
            "samples": word("samples"),
            "chosen": lambda row: "yes" if row["chosen"] else "",
        },
    ),
}
"""Title, row function, explanation and columns of each table, by file name."""
