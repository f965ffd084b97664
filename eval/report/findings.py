"""What the tables say, in sentences, whichever way it turned out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Rows = list[dict[str, Any]]


def findings(tables: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences on the questions of section VII of 003_92b41fe49395ce1a.txt.

    Args:
        tables: of `report.json`.
    """
    made = []
    for name, tell in (("metrics", _metrics), ("boxes", _boxes), ("boxes", _gains)):
        if name in tables:
            made += tell(tables[name]["rows"])
    if "chosen" in tables:
        made += _chosen(tables["chosen"]["rows"])
    return made


def _metrics(rows: Rows) -> list[str]:
    made = []
    for part in dict.fromkeys(row["part"] for row in rows):
        full = [r for r in rows if r["part"] == part and r["setting"].endswith("/full")]
        best = max(full, key=lambda row: row["area"])
        base = next(row for row in full if row["setting"] == "min_entropy/full")
        low, high = best["difference_interval"]
        if best is base:
            said = "min-entropy has the largest area over the random line"
        else:
            holds = "does not hold 0" if low > 0 else "holds 0"
            said = (
                f"{best['setting'].partition('/')[0]}, not min-entropy, has the largest area over "
                f"the random line ({best['area']:.4f} against {base['area']:.4f}; the interval of "
                f"the difference, [{low:.4f}, {high:.4f}], {holds})"
            )
        if all(row["area_interval"][1] < 0 for row in full):
            said += "; every metric does worse than random choice"
        elif base["area_interval"][1] < 0:
            said += "; min-entropy does worse than random choice"
        elif base["area_interval"][0] <= 0:
            said += "; min-entropy is not surely better than random choice"
        made.append(f"Metrics, {part}: {said}.")
    return made


def _boxes(rows: Rows) -> list[str]:
    made = []
    for row in rows:
        if "difference" not in row:
            continue
        low, high = row["difference_interval"]
        word = "better than" if low > 0 else "worse than" if high < 0 else "not surely better than"
        made.append(
            f"Regions, {row['part']}: they cover {row['covered']:.1%} of the true place, {word} "
            f"regions placed at random ({row['covered_at_random']:.1%})."
        )
    return made


def _gains(rows: Rows) -> list[str]:
    made = []
    for row in rows:
        low, high = row["gain_interval"]
        if low <= 0:
            word = "worse" if high < 0 else "not surely better"
            made.append(
                f"Second answers, {row['part']}: {word} than first ones ({row['gain']:+.1%}; "
                f"{row['improved']} improved, {row['worsened']} worsened)."
            )
    return made


def _chosen(rows: Rows) -> list[str]:
    return [
        f"Chosen for “{row['name']}”: {row['rate']:.1%} of the regions instead of all, accuracy "
        f"{row['accuracy']:.1%}, loss against full retransmission {row['loss']:.1%} "
        f"[{row['loss_interval'][0]:.1%}, {row['loss_interval'][1]:.1%}]."
        for row in rows
        if row["name"].startswith("loss")
    ]
