"""The saved results: how a file of them is laid out and read.

A file is JSON with a line for each thing that it holds::

    benchmark, complete, holds, failures    the claim, and whether it holds
    command, date, machine, versions        what ran, when, and where
    settings                                what must be equal to go on with a file
    rows                                    the table; some files hold others as well

A table is saved in blocks of rows with the same columns, a row a line::

    {"all": {"section": "import"}, "columns": ["what", "low"], "rows": [
    ["import jaxgrl", 3.1]
    ]}

``all`` is what every row of the block has in common. ``read`` returns the tables as
lists of dictionaries. Floats are rounded to six significant digits.

The rows of ``correctness`` have the columns ``group``, ``situation`` and one for each
implementation. A cell is "right", "wrong: <what came out>" or "error: <its type and
message>". Where versions of JAX differ it is a list: first ``versions``, then each of
``beside``.

This module needs nothing but Python.
"""

import json
import pathlib
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

Row = dict[str, Any]
DIGITS = 6
BLOCK = {"all", "columns", "rows"}


def read(path: pathlib.Path) -> dict[str, Any]:
    """Returns what a file holds, its tables as lists of rows."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return {key: _rows(value) for key, value in data.items()}


def newest(folder: pathlib.Path, name: str) -> dict[str, Any] | None:
    """Returns the newest whole results of a benchmark on a CPU, if there are any."""
    found = [d for d in whole(folder, name) if d["machine"]["device"] == "cpu"]
    return max(found, key=lambda data: data["date"], default=None)


def whole(folder: pathlib.Path, name: str) -> list[dict[str, Any]]:
    """Returns the complete results of a benchmark, quick runs aside, by file name."""
    return [d for d in saved(folder, name) if d["complete"]]


def saved(folder: pathlib.Path, name: str) -> list[dict[str, Any]]:
    """Returns all results of a benchmark, quick runs aside, by file name."""
    found = [read(path) for path in sorted(folder.glob(f"{name}-*.json"))]
    return [data for data in found if "--quick" not in data["command"]]


def rounded(value: Any) -> Any:
    """Returns the value with its floats, at any depth, as a file has them."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(entry) for entry in value]
    return value


def as_text(data: dict[str, Any]) -> str:
    """Returns the text of a file."""
    lines = [f"{_json(key)}: {_shown(rounded(value))}" for key, value in data.items()]
    return "{{\n{}\n}}\n".format(",\n".join(lines))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _is_table(value: Any) -> bool:
    filled = isinstance(value, list) and value
    return bool(filled) and all(isinstance(row, dict) for row in value)


def _shown(value: Any) -> str:
    if not _is_table(value):
        return _json(value)
    blocks = [
        _block(list(rows))
        for _, alike in groupby(value, tuple)
        for rows in _split(list(alike))
    ]
    return "[\n{}\n]".format(",\n".join(blocks))


def _split(rows: list[Row]) -> Iterator[Iterable[Row]]:
    """Yields rows that share each text that stays for eight rows on average."""

    def stays(key: str) -> bool:
        runs = sum(1 for _ in groupby(rows, lambda row: _json(row[key])))
        return isinstance(rows[0][key], str) and 8 * runs <= len(rows)

    keys = [key for key in rows[0] if stays(key)]
    return (own for _, own in groupby(rows, lambda row: [row[key] for key in keys]))


def _block(rows: list[Row]) -> str:
    first = rows[0]
    # As text: a number and the bool that it is equal to are not the same.
    common = {
        key: value
        for key, value in first.items()
        if len(rows) > 1 and len({_json(row[key]) for row in rows}) == 1
    }
    columns = [key for key in first if key not in common]
    lines = ",\n".join(_json([row[key] for key in columns]) for row in rows)
    head = f'"all":{_json(common)},"columns":{_json(columns)}'
    return f'{{{head},"rows":[\n{lines}\n]}}'


def _rows(value: Any) -> Any:
    if not _is_table(value) or any(block.keys() != BLOCK for block in value):
        return value
    return [
        block["all"] | dict(zip(block["columns"], row, strict=True))
        for block in value
        for row in block["rows"]
    ]
