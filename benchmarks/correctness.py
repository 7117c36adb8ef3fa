r"""Who is right: situations by implementations of gradient reversal that people use.

The claim: jaxgrl is right in every situation, on every JAX that was run, but for the
known limits that its documents name; and each of those is still exactly as documented.

Each cell is decided by running it. What is right comes from ordinary autodiff of
functions without any custom rule (see situations.py), to a few roundings of the dtype:

    right   the gradient, its dtype and its shape
    WRONG   silently wrong: something else came out, and nothing was said
    error   an exception; in a situation that is a mistake of the user's, an
            exception at the call is right, and one in the backward pass is not

Situations are sorted by how likely a user meets them. Exits with status 1 where the
claim does not hold.

    python benchmarks/correctness.py                        # this JAX, about a minute
    python benchmarks/correctness.py --also OTHER/python    # beside the JAX of another
    python benchmarks/correctness.py --quick                # the README's excerpt
    python benchmarks/correctness.py --markdown             # its table

The other interpreter needs jaxgrl and its benchmarks extra too. Only on CPU: whether a
derivative is right is decided while JAX traces.
"""

import itertools
import json
import pathlib
import shutil
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from parts.report import (
    PACKAGES,
    Record,
    Row,
    interruptible,
    make_parser,
    print_markdown,
    print_table,
)
from parts.reversals import REVERSALS
from parts.situations import SITUATIONS, Situation
from support.files import versions
from tqdm import tqdm

Cell = dict[str, str]  # verdict: right, wrong or error; text: what came out
Cells = dict[str, dict[str, Cell]]  # by the names of situation and implementation

RIGHT: Cell = {"verdict": "right", "text": ""}
MARKS = {"right": "ok", "wrong": "WRONG", "error": "error"}
HEADERS = {
    "nondiff_argnums": "nondiff",
    "whole tree": "tree",
    "stop_gradient trick": "stop_grad",
    "optax.scale_gradient": "optax",
}
FOLDER = f"{pathlib.Path(__file__).parents[1]}/"
README = (
    "jaxgrl",
    "five lines",
    "custom_jvp",
    "stop_gradient trick",
    "optax.scale_gradient",
)
WIDTH = 64  # of a text


def main() -> None:
    """Runs every cell, prints the matrix and what is behind it, checks the claim."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--also",
        metavar="PYTHON",
        action="append",
        default=[],
        help="an interpreter with another JAX, shown side by side; may be repeated",
    )
    parser.add_argument(
        "--quick", action="store_true", help="the likeliest situations and the limits"
    )
    parser.add_argument(
        "--markdown", action="store_true", help="print the table of the README instead"
    )
    parser.add_argument("--cells", action="store_true", help="print the cells as JSON")
    options = parser.parse_args()
    quick = [s for s in SITUATIONS if s.excerpt or s.group == "known limits"]
    situations = quick if options.quick else SITUATIONS
    for python in options.also:
        if not shutil.which(python):
            parser.error(f"--also must be a Python interpreter, got {python}")

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    if options.cells:
        json.dump(run_here(situations), sys.stdout)
        return

    record = Record("correctness", options.output)
    runs: dict[str, Cells] = {}
    failures = []
    record.data["beside"] = []
    for python in [None, *options.also]:
        if python is None:
            run = run_here(situations)
        else:
            command = [python, __file__, "--cells", *["--quick"] * options.quick]
            printed = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
            run = json.loads(printed)
            record.data["beside"].append(run["versions"])
        version = run["versions"]["jax"]
        if version in runs:
            parser.error(f"{python} has jax {version}, which is shown already")
        runs[version] = run["cells"]
        failures += run["failures"]
        record.rows[:] = make_rows(situations, runs)
        record.save()

    if options.markdown:
        print_excerpt(situations, runs)
    else:
        print_matrix(situations, runs)
        print_details(situations, runs)
        print_totals(situations, runs)
    for other in record.data["beside"]:
        print("\nBeside " + ", ".join(f"{k} {v}" for k, v in other.items()))
    claim = "jaxgrl is right but for its known limits, and these are as documented."
    sys.exit(record.close(claim, failures))


def run_here(situations: list[Situation]) -> dict[str, Any]:
    """Returns what this interpreter's JAX does: cells, versions, where it fails."""
    cells = run_cells(situations)
    failures = list(find_failures(situations, cells))
    return {"versions": versions(PACKAGES), "cells": cells, "failures": failures}


def make_rows(situations: list[Situation], runs: dict[str, Cells]) -> list[Row]:
    """Returns the rows that are saved (see parts/results.py)."""
    rows = []
    for situation, cells in _grid(situations, runs):
        row: Row = {"group": situation.group, "situation": situation.name}
        for name, each in cells.items():
            texts = [saved(cell) for cell in each]
            row[name] = texts[0] if len(set(texts)) == 1 else texts
        rows.append(row)
    return rows


def saved(cell: Cell) -> str:
    """Returns a cell as text."""
    return f"{cell['verdict']}: {short(cell['text'])}".removesuffix(": ")


def short(text: str) -> str:
    """Returns the text, or its beginning."""
    return text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."


def run_cells(situations: list[Situation]) -> Cells:
    """Runs every implementation in every situation, in this process."""
    bar = tqdm(situations, f"jax {jax.__version__}", disable=None, leave=False)
    cells: Cells = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for situation in bar:
            cells[situation.name] = run_situation(situation)
    return cells


def run_situation(situation: Situation) -> dict[str, Cell]:
    """Runs every implementation in one situation."""
    cells: dict[str, Cell] = {}
    answers = []
    for name, reverse in REVERSALS.items():
        try:
            got, right = situation.run(reverse)
            answers.append(right)
            text = difference(got, right, exact=situation.exact)
        except Exception as error:  # whatever it is, it is what the user sees
            line = next(iter(str(error).splitlines()), "").replace(FOLDER, "")
            cells[name] = {
                "verdict": "error",
                "text": f"{type(error).__name__}: {line}".removesuffix(": "),
            }
        else:
            cells[name] = {"verdict": "wrong", "text": text} if text else RIGHT
    if any(difference(other, answers[0], exact=True) for other in answers[1:]):
        text = "what is right depends on whom it is asked about: no oracle"
        return {name: {"verdict": "error", "text": text} for name in REVERSALS}
    return cells


def difference(got: Any, right: Any, *, exact: bool) -> str:
    """Returns the first difference of two trees, or nothing."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(right)
    if jax.tree.structure(got) != structure:
        return f"{jax.tree.structure(got)}, not {structure}"
    for a, (path, b) in zip(jax.tree.leaves(got), leaves, strict=True):
        if text := _leaf_difference(a, b, exact):
            # A name, where the tree has one: "traces: 3, not 1".
            names = [str(p.key) for p in path if isinstance(p, jax.tree_util.DictKey)]
            return ": ".join([*names, text])
    return ""


def _leaf_difference(got: Any, right: Any, exact: bool) -> str:
    if isinstance(got, str) and isinstance(right, str) and got == right:
        return ""
    if isinstance(right, str):
        return f"{_shown(np.asarray(got).flat[0])}, not {right}"
    a, b = np.asarray(got), np.asarray(right)
    if a.dtype != b.dtype and isinstance(got, jax.Array | np.ndarray | np.generic):
        return f"{a.dtype}, not {b.dtype}"
    if a.shape != b.shape:
        return f"shape {a.shape}, not {b.shape}"
    if exact:
        bits = (f"u{a.itemsize}", f"u{b.itemsize}")
        differs = a.view(bits[0]) != b.view(bits[1])
    else:
        wide = np.complex128 if np.iscomplexobj(b) else np.float64
        differs = ~_close(a.astype(wide), b.astype(wide), _precision(b.dtype))
    if not differs.any():
        return ""
    return _two_numbers(a[differs][0], b[differs][0])


def _close(a: np.ndarray, b: np.ndarray, precision: float) -> np.ndarray:
    """Elementwise; the second tolerance is for sums whose terms cancel."""
    finite = np.abs(np.where(np.isfinite(b), b, 0))
    tolerance = precision * (finite + finite.max(initial=0) / 10)
    with np.errstate(invalid="ignore"):
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        return same | (np.abs(a - b) <= tolerance)


def _precision(dtype: Any) -> float:
    """Relative: one unit in the last place of 16 bits, a hundred of 32 and 64."""
    if not jax.numpy.issubdtype(dtype, np.inexact):
        return 0.0
    eps = float(jax.numpy.finfo(dtype).eps)
    return eps if eps > 1e-5 else 100 * eps


def _two_numbers(a: Any, b: Any) -> str:
    """Both, with as few digits as show that they differ."""
    for digits in (3, 5, 9, 17):
        first, second = _shown(a, digits), _shown(b, digits)
        if first != second:
            break
    return f"{first}, not {second}"


def _shown(value: Any, digits: int = 3) -> str:
    if isinstance(value, str):
        return value
    z = complex(value)
    if z.imag or np.iscomplexobj(value):
        return f"{z:.{digits}g}"
    return f"{z.real:.{digits}g}"


def combined(cells: list[Cell], show: Callable[[Cell], str], between: str) -> str:
    """Returns what is shown of a cell on every JAX: once where all agree."""
    return between.join(dict.fromkeys(show(cell) for cell in cells))


def _grid(
    situations: list[Situation], runs: dict[str, Cells]
) -> Iterator[tuple[Situation, dict[str, list[Cell]]]]:
    for s in situations:
        yield (
            s,
            {name: [run[s.name][name] for run in runs.values()] for name in REVERSALS},
        )


def print_matrix(situations: list[Situation], runs: dict[str, Cells]) -> None:
    """Prints a mark for each cell; two, where the versions of JAX differ."""
    headers = {name: HEADERS.get(name, name) for name in REVERSALS}
    rows: list[dict[str, str]] = []
    for (situation, cells), previous in zip(
        _grid(situations, runs), [None, *situations], strict=False
    ):
        if previous is None or previous.group != situation.group:
            rows += [{}, {"situation": situation.group.upper()}]
        marks = {
            headers[name]: combined(each, lambda cell: MARKS[cell["verdict"]], "/")
            for name, each in cells.items()
        }
        rows.append({"situation": situation.name, **marks})
    print_table(rows, ("situation", *headers.values()))
    if len(runs) > 1:
        print(f"\nTwo marks: what differs between jax {' / '.join(runs)}.")


def print_details(situations: list[Situation], runs: dict[str, Cells]) -> None:
    """Prints what came out, for each cell that is not right."""
    print("\nWhat came out, where it is not right:")
    for situation, cells in _grid(situations, runs):
        names: dict[str, list[str]] = {}
        for name, each in cells.items():
            texts = [short(cell["text"] or "right") for cell in each]
            if len(set(texts)) == 1:
                names.setdefault(texts[0], []).append(name)
            else:
                pairs = zip(runs, texts, strict=True)
                text = "; ".join(f"{version}: {t}" for version, t in pairs)
                names.setdefault(text, []).append(name)
        names.pop("right", None)
        if names:
            print(f"\n{situation.name}")
        for text, who in names.items():
            print(f"  {text}  <- {', '.join(who)}")


def print_totals(situations: list[Situation], runs: dict[str, Cells]) -> None:
    """Prints how often each implementation is right."""
    counted = [s.name for s in situations if not s.limit]
    print(f"\nOf {len(counted)} situations, the known limits of jaxgrl aside:\n")
    rows = []
    for name, (version, cells) in itertools.product(REVERSALS, runs.items()):
        counts = Counter(cells[s][name]["verdict"] for s in counted)
        rows.append(
            {
                "implementation": name,
                "jax": version,
                "right": counts["right"],
                "silently wrong": counts["wrong"],
                "error": counts["error"],
            }
        )
    print_table(rows, ("implementation", "jax", "right", "silently wrong", "error"))


def print_excerpt(situations: list[Situation], runs: dict[str, Cells]) -> None:
    """Prints the table of the README: the excerpt, wrong numbers in bold."""

    def show(cell: Cell) -> str:
        if cell["verdict"] == "wrong":
            return f"**{cell['text']}**"
        return cell["text"].split(":")[0] or "right"

    excerpt = _grid([s for s in situations if s.excerpt], runs)
    print_markdown(
        ["", *README],
        [
            [situation.name, *(combined(cells[n], show, " / ") for n in README)]
            for situation, cells in excerpt
        ],
    )
    print(f"\nBold is silently wrong; where two stand, jax {' / '.join(runs)}.")


def find_failures(situations: list[Situation], cells: Cells) -> Iterator[str]:
    """Yields where jaxgrl is not right, or a limit is not what the documents say."""
    for situation in situations:
        cell = cells[situation.name]["jaxgrl"]
        if situation.limit:
            fails = not cell["text"].startswith(situation.limit)
        else:
            fails = cell["verdict"] != "right"
        if fails:
            but = f", documented as {situation.limit}" if situation.limit else ""
            text = cell["text"] or "right"
            yield f"jax {jax.__version__}: {situation.name}: {text}{but}"


if __name__ == "__main__":
    interruptible(main)
