"""Findings of a report: sentences derived from its tables, favourable or not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Rows = list[dict[str, Any]]


def findings(tables: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences on the questions of section VII of Song and Kim, *Collaborative Edge-to-Server
    Inference for Vision-Language Models* (2025, arXiv 2512.16349).

    Args:
        tables: the tables of `report.json`.
    """
    sentences = []
    parts = (
        ("metrics", _metrics), ("metrics", _aggregations), ("boxes", _boxes), ("boxes", _gains),
    )  # fmt: skip
    for name, sentences_of in parts:
        if name in tables:
            sentences += sentences_of(tables[name]["rows"])
    if "chosen" in tables:
        sentences += _chosen(tables["chosen"]["rows"])
    return sentences


def _metrics(rows: Rows) -> list[str]:
    sentences = []
    for part in dict.fromkeys(row["part"] for row in rows):
        full = [r for r in rows if r["part"] == part and r["setting"].endswith("/full")]
        best = max(full, key=lambda row: row["area"])
        base = next(row for row in full if row["setting"] == "min_entropy/full")
        others = [row for row in full if row is not base]
        if others:
            # Rows give differences from min-entropy, so it is one of the two compared.
            other = best if best is not base else max(others, key=lambda row: row["area"])
            named = str(other["setting"]).partition("/")[0]
            if _tied(other):
                same = [str(row["setting"]).partition("/")[0] for row in others if _tied(row)]
                listed = " and ".join([", ".join(["min-entropy", *same[:-1]]), same[-1]])
                sentence = f"{listed} are tied for the largest area over the random line"
            elif best is base:
                sentence = f"min-entropy has the largest area over the random line, before {named}"
            else:
                sentence = f"{named}, not min-entropy, has the largest area over the random line"
            sentence += f" ({named} {_against(other, base)})"
        else:
            sentence = "min-entropy is the only metric that the run recorded"
        if all(row["area_interval"][1] < 0 for row in full):
            sentence += "; every metric does worse than random choice"
        elif base["area_interval"][1] < 0:
            sentence += "; min-entropy does worse than random choice"
        elif base["area_interval"][0] <= 0:
            sentence += "; min-entropy is not significantly better than random choice"
        sentences.append(f"Metrics, {part}: {sentence}.")
    return sentences


def _aggregations(rows: Rows) -> list[str]:
    """Sentences on min-entropy over part of the answer, and on the best of all criteria."""
    sentences = []
    for part in dict.fromkeys(row["part"] for row in rows):
        here = [row for row in rows if row["part"] == part]
        base = next(row for row in here if row["setting"] == "min_entropy/full")
        shorter = [
            row
            for row in here
            if row["setting"].startswith("min_entropy/")
            and row is not base
            # Equal to the full average if all answers have one token.
            and tuple(row["difference_interval"]) != (0.0, 0.0)
        ]
        if not shorter:
            continue
        other = max(shorter, key=lambda row: row["area"])
        named = str(other["setting"]).partition("/")[2]
        if _tied(other):
            sentence = f"min-entropy over the whole answer and {named} are tied"
        elif other["area"] > base["area"]:
            sentence = (
                f"min-entropy's {named} is better than its average over the whole answer, which "
                "the paper recommends"
            )
        else:
            sentence = "min-entropy is best averaged over the whole answer, as in the paper"
            sentence += f", before {named}"
        sentence += f" ({named} {_against(other, base)})"
        best = max(here, key=lambda row: row["area"])
        if best is not base and best is not other:
            sentence += (
                f"; of all {len(here)} settings {best['setting']} has the largest area"
                f"{', tied with min_entropy/full' if _tied(best) else ''} ({_against(best, base)})"
            )
        sentences.append(f"Aggregation, {part}: {sentence}.")
    return sentences


def _tied(row: dict[str, Any]) -> bool:
    """Whether the interval of a setting's difference from min_entropy/full contains 0."""
    low, high = row["difference_interval"]
    return bool(low <= 0 <= high)


def _against(row: dict[str, Any], base: dict[str, Any]) -> str:
    low, high = row["difference_interval"]
    contains = "contains 0" if _tied(row) else "does not contain 0"
    return (
        f"{row['area']:z.4f} against {base['area']:z.4f}; the interval of the difference, "
        f"[{low:z.4f}, {high:z.4f}], {contains}"
    )


def _boxes(rows: Rows) -> list[str]:
    sentences = []
    for row in rows:
        if "difference" not in row:
            continue
        low, high = row["difference_interval"]
        word = "better" if low > 0 else "worse" if high < 0 else "not significantly better"
        sentences.append(
            f"Regions, {row['part']}: they cover {row['covered']:.1%} of the true place (mean of "
            f"the {row['with_box']} questions for which it is known), {word} than regions placed "
            f"at random ({row['covered_at_random']:.1%})."
        )
    return sentences


def _gains(rows: Rows) -> list[str]:
    sentences = []
    for row in rows:
        low, high = row["gain_interval"]
        if low <= 0:
            word = "worse" if high < 0 else "not significantly better"
            sentences.append(
                f"Second answers, {row['part']}: {word} than first ones ({row['gain']:+.1%}; "
                f"{row['improved']} improved, {row['worsened']} worsened)."
            )
    return sentences


def _chosen(rows: Rows) -> list[str]:
    return [
        f"Threshold for “{row['name']}”: sends {row['rate']:.1%} of the regions, accuracy "
        f"{row['accuracy']:.1%}, loss against full retransmission {row['loss']:.1%} "
        f"[{row['loss_interval'][0]:.1%}, {row['loss_interval'][1]:.1%}]."
        for row in rows
        if row["name"].startswith("loss")
    ]
