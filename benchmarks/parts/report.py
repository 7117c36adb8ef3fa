"""What every benchmark prints and saves: a table, a verdict, and a file of results.

The file (see results.py) is written after every addition and in one move. An
interruption leaves what was added, marked as incomplete.
"""

import argparse
import contextlib
import datetime
import itertools
import os
import pathlib
import platform
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from support.files import replace, versions

from parts import results
from parts.results import Row

ROOT = pathlib.Path(__file__).parents[2]
SAME = ("benchmark", "settings", "machine", "versions")  # in a file to go on with
PACKAGES = ("jaxgrl", "jax", "jaxlib", "flax", "optax", "numpy")


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser whose --help is the script's docstring."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("runs"),
        help="folder of the results, each run a new JSON file (default: runs)",
    )
    return parser


def command() -> str:
    """Returns the command without the folders of this machine."""
    shown, arguments = [], iter(sys.argv[1:])
    for argument in arguments:
        if argument == "--output":
            next(arguments, None)
        elif not argument.startswith("--output="):
            option, _, value = argument.rpartition("=")
            path = pathlib.PurePath(value)
            if path.is_absolute() or ".." in path.parts:
                argument = f"{option}={path.name}" if option else f"PATH/{path.name}"
            shown.append(argument)
    script = pathlib.Path(sys.argv[0]).resolve()
    if script.is_relative_to(ROOT):
        script = script.relative_to(ROOT)
    return shlex.join(["python", str(script), *shown])


def processor() -> str:
    """Returns the name of the processor."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write(path: pathlib.Path, data: dict[str, Any]) -> None:
    """Writes a file in one move: an interruption leaves the old one or the new."""
    text = results.as_text(data).encode()
    replace(path, lambda draft: draft.write_bytes(text))


class Record:
    """The results of one run, saved in a file that no other run writes.

    Attributes:
      rows: The rows of the table, each a dictionary; ``add`` appends to them.
      path: The file, named by benchmark, device, machine and date.
    """

    def __init__(
        self,
        name: str,
        folder: pathlib.Path,
        *,
        device: str | None = None,
        packages: Sequence[str] = PACKAGES,
        settings: dict[str, Any] | None = None,
        resume: pathlib.Path | None = None,
    ):
        """Starts the file, or goes on with one.

        Args:
          name: The benchmark.
          folder: Where a new file goes.
          device: What ran or was compiled for, if no CPU.
          packages: Whose versions are saved.
          settings: What must be the same for a file to be gone on with.
          resume: The file to go on with, in place of a new one.
        """
        now = datetime.datetime.now().astimezone()
        cores = os.cpu_count()
        machine = f"{device or processor()} {'' if device else f'{cores} cores'}"
        slug = re.sub(r"[^a-z0-9.]+", "-", f"{name} {machine}".lower()).strip("-")
        self.rows: list[Row] = []
        stem = f"{slug}-{now:%Y%m%d-%H%M%S}"
        self.data: dict[str, Any] = {
            "benchmark": name,
            "complete": False,
            "holds": None,
            "failures": [],
            "command": command(),
            "date": now.isoformat(timespec="seconds"),
            "machine": {
                "processor": processor(),
                "cores": cores,
                "platform": platform.platform(),
                "device": device or "cpu",
            },
            "versions": versions(packages),
            "settings": settings or {},
            "rows": self.rows,
        }
        if resume is None:
            self.path = self._claim(folder, stem)
        else:
            self.path = resume
            self._resume()
        self.save()

    def _resume(self) -> None:
        """Takes over the rows of the file, if they belong to the same benchmark."""
        try:
            old = results.read(self.path)
            rows = list(old["rows"])
            old = {k: old[k] for k in (*SAME, "date")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            sys.exit(f"--resume must be a file of results, got {self.path}: {error!r}")
        settings = self.data["settings"]
        old["settings"] = {k: v for k, v in old["settings"].items() if k in settings}
        for key in SAME:
            if old[key] != self.data[key]:
                sys.exit(
                    f"--resume must be a file with the same {key}, {self.data[key]}, "
                    f"got {old[key]}"
                )
        self.rows.extend(rows)
        self.data["date"] = old["date"]

    def _claim(self, folder: pathlib.Path, stem: str) -> pathlib.Path:
        """Returns a file of that name that was not there, or with a number behind."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for number in itertools.count(1):
                path = folder / f"{stem}{f'-{number}' if number > 1 else ''}.json"
                with contextlib.suppress(FileExistsError):
                    path.touch(exist_ok=False)
                    return path
        except OSError as error:
            sys.exit(f"--output must be a folder to write in, got {folder}: {error}")
        raise AssertionError("unreachable")

    def add(self, row: Row) -> None:
        """Appends a row, its floats as the file has them, and saves it."""
        self.rows.append(results.rounded(row))
        self.save()

    def save(self) -> None:
        """Writes the file."""
        write(self.path, self.data)

    def close(self, claim: str | None, failures: Iterable[str]) -> int:
        """Saves and prints the verdict; returns the exit status that it deserves.

        A claim of None is not judged.
        """
        failures = list(failures)
        holds = None if claim is None and not failures else not failures
        self.data |= {"complete": True, "holds": holds, "failures": failures}
        self.save()
        machine = self.data["machine"]
        print(f"\n{self.data['command']}")
        print(
            f"{self.data['date']}; {machine['device']}; {machine['processor']}, "
            f"{machine['cores']} cores, {machine['platform']}"
        )
        print(", ".join(f"{k} {v}" for k, v in self.data["versions"].items()))
        print(f"Saved in {self.path}")
        if failures:
            print("The claim does not hold:", *failures, sep="\n")
        elif claim is None:
            print("No claim was judged.")
        else:
            print(f"The claim holds: {claim}")
        return int(bool(failures))


def interruptible(main: Callable[[], Any]) -> None:
    """Runs main and exits with what it returns; an interruption is no traceback."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted: what was finished is saved, marked incomplete.")


def print_table(rows: Sequence[Row], columns: Sequence[str]) -> None:
    """Prints the columns of the rows: text to the left, numbers to the right."""
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    numeric = [
        any(isinstance(row.get(column), int | float) for row in rows)
        for column in columns
    ]

    def line(texts: Sequence[str]) -> str:
        pads: list[Callable[[str, int], str]] = [
            str.rjust if n else str.ljust for n in numeric
        ]
        padded = (p(t, w) for p, t, w in zip(pads, texts, widths, strict=True))
        return "  ".join(padded).rstrip()

    print(line(columns))
    for texts in cells:
        print(line(texts))


def print_markdown(header: Sequence[Any], rows: Iterable[Sequence[Any]]) -> None:
    """Prints a table as Markdown, behind an empty line."""
    print()
    for cells in (header, ["---"] * len(header), *rows):
        print(f"| {' | '.join(map(str, cells))} |")


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
