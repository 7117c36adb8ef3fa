"""How overhead.py saves the counts of its programs, for plot.py to read.

A row is a program: its case, and for each part and layer what was counted, as a list in
the order of ``COLUMNS``, "equal", or the type of an error. "Equal" is to the layer that
the part is measured against (``AGAINST``), in counts, collectives and bits.
"""

import hashlib
import re
from collections import Counter
from typing import Any

from parts.results import Row

Counts = dict[str, Any]  # column -> count
Parts = dict[str, dict[str, Counts]]  # forward and gradient, by the name of the layer
CASE = ("program", "dtype", "scale", "sharded")
AGAINST = {"forward": "none", "gradient": "by hand"}
FORWARD = ("ops", "fusions", "flops", "bytes", "copies", "temp bytes")
COLUMNS: tuple[str, ...] = (*FORWARD, "residual bytes", "collectives", "same bits")


def to_row(case: Row, parts: Parts) -> Row:
    """Returns the row of a file for the counts of a case."""
    row = {key: case[key] for key in CASE}
    for part, layers in parts.items():
        limit = _entry(layers[AGAINST[part]])
        for layer, counts in layers.items():
            entry = counts.get("error") or _entry(counts)
            same = entry[:-1] == limit[:-1] and counts.get("same bits", True)
            equal = same and layer != AGAINST[part]
            row[f"{part}, {layer}"] = "equal" if equal else entry
    return row


def from_row(row: Row) -> tuple[Row, Parts]:
    """Returns the case and the counts of a row; of collectives, what ``summed`` has."""
    parts: Parts = {}
    for key, entry in row.items():
        part, _, layer = key.partition(", ")
        if part not in AGAINST:
            continue
        if entry == "equal":
            entry = row[f"{part}, {AGAINST[part]}"]
        counts: Counts = {"error": entry}
        if isinstance(entry, list):
            counts = dict(zip(COLUMNS, entry, strict=True))
        parts.setdefault(part, {})[layer] = counts
    return {key: row[key] for key in CASE}, parts


def summed(collectives: list[str]) -> str:
    """Returns kinds, their number, and a digest that other shapes or order change."""
    kinds = Counter(re.sub(r".* ", "", entry) for entry in collectives)
    digest = hashlib.sha256("\n".join(collectives).encode()).hexdigest()[:6]
    shown = [f"{number} {kind}" for kind, number in kinds.items()]
    return ", ".join([*shown, digest]) if shown else "none"


def _entry(counts: Counts) -> list[Any]:
    known = counts | {"collectives": summed(counts["collectives"])}
    return [known.get(column) for column in COLUMNS]
