"""What every example needs beside its training: options, a run folder, a table."""

import argparse
import datetime
import json
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from .files import replace, versions

CHUNK = 100  # steps in one compiled call, and between two evaluations
PACKAGES = ("jaxgrl", "jax", "jaxlib", "flax", "optax", "numpy", "scikit-learn")
LARGEST = float(np.finfo(np.float32).max)
RULES = {  # of the options that several examples have
    "angle": (lambda v: -180 <= v <= 180, "between -180 and 180"),
    "seeds": (lambda v: 1 <= v <= 1000, "between 1 and 1000"),
    "steps": (lambda v: v > 0 and v % CHUNK == 0, f"a positive multiple of {CHUNK}"),
    "scale": (lambda v: 0 <= v <= LARGEST, "finite in float32 and 0 or more"),
    "learning-rate": (lambda v: 0 < v <= LARGEST, "finite in float32 and positive"),
}


def make_parser(doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Returns a parser with --output, --no-plot and the options that have a default."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    helps = {
        "angle": "rotation of the target in degrees",
        "seeds": "number of runs of each method",
        "steps": f"training steps of a run, a multiple of {CHUNK}",
        "scale": "final strength of the reversal",
        "learning-rate": "learning rate at the start of a run",
    }
    for name, default in defaults.items():
        name = name.replace("_", "-")
        text = f"{helps[name]} (default: {default})"
        parser.add_argument(f"--{name}", type=type(default), default=default, help=text)
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("runs"),
        help="folder in which a run makes its own folder (default: runs)",
    )
    parser.add_argument("--no-plot", action="store_true", help="draw no picture")
    return parser


def parse(parser: argparse.ArgumentParser, **rules: Any) -> argparse.Namespace:
    """Returns the options, each checked by its rule, a pair (holds, in words)."""
    args = parser.parse_args()
    for name, (holds, rule) in (RULES | rules).items():
        value = getattr(args, name.replace("-", "_"), None)
        if value is not None and not holds(value):
            parser.error(f"--{name} must be {rule}, got {value}")
    return args


class Run:
    """One run of an example: its folder, and the results file in it.

    The file is there from the start, marked incomplete, and is replaced in one move, so
    an interruption leaves what was finished.

    Args:
      name: The example's, which starts the name of the folder.
      args: The options, which are part of the results.
      packages: Whose versions are saved.
      **facts: More entries of the results.
    """

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        packages: Iterable[str] = PACKAGES,
        **facts: Any,
    ):
        now = datetime.datetime.now()
        self.folder = args.output / f"{name}-{now:%Y%m%d-%H%M%S-%f}"
        self.folder.mkdir(parents=True)
        options = {
            k: str(v) if isinstance(v, pathlib.Path) else v
            for k, v in vars(args).items()
        }
        self.results: dict[str, Any] = {
            "complete": False,
            "command": shlex.join(sys.argv),
            "date": now.astimezone().isoformat(timespec="seconds"),
            "arguments": options,
            "versions": versions(packages),
            "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
            "seconds": {},
            **facts,
        }
        self.start = time.perf_counter()
        self.save()

    def save(self) -> None:
        """Writes the results file in one move."""
        text = json.dumps(self.results, indent=1)
        replace(self.folder / "results.json", lambda draft: draft.write_text(text))

    def __enter__(self) -> "Run":
        """Starts what an interruption may cut short."""
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        """Marks the results complete, or says what an interruption leaves."""
        if kind is None:
            self.results["complete"] = True
            self.results["seconds"]["in all"] = time.perf_counter() - self.start
        self.save()
        if kind is KeyboardInterrupt:
            sys.exit(
                f"Interrupted: {self.folder} has what was finished, marked incomplete"
            )

    def follow(self, chunks: Iterable[Any], total: int, steps: int) -> None:
        """Shows a progress bar over (method, step, metrics), and saves each method."""
        self.results["layout"] = (
            f"methods[method][number][evaluation, every {CHUNK} steps][seed]; of an "
            "array for each seed, the last evaluation alone"
        )
        curves: dict[str, list[Any]] = {}
        with tqdm(total=total, unit="step") as bar:
            for method, step, seconds, metrics in chunks:
                for name, values in metrics.items():
                    kept = curves.setdefault(name, [])
                    if values.ndim > 1:
                        kept.clear()
                    kept.append(values.tolist())
                means = {k: f"{v.mean():.2f}" for k, v in metrics.items() if v.ndim < 2}
                bar.set_description(method, refresh=False)
                bar.set_postfix({"step": step, **means}, refresh=False)
                bar.update(CHUNK)
                if step == steps:
                    self.results["methods"][method], curves = curves, {}
                    self.results["seconds"] |= seconds
                    self.save()

    def print_where(self) -> None:
        """Prints the seconds, the machine and the folder."""
        seconds = self.results["seconds"].items()
        times = ", ".join(f"{name} {value:.1f} s" for name, value in seconds)
        jax_version = self.results["versions"]["jax"]
        print(f"{times}; on {self.results['device']}, jax {jax_version}")
        print(f"Saved in {self.folder}")


def print_methods(methods: Mapping[str, Any]) -> None:
    """Prints a row for each method: target accuracy, and its gain over the first."""
    print(f"{'target accuracy [%]':>35}{'gain over source only':>25}{'worst seed':>14}")
    first, *_ = methods
    baseline = 100 * np.array(methods[first]["target_accuracy"][-1])
    for method, curves in methods.items():
        accuracy = 100 * np.array(curves["target_accuracy"][-1])
        gain = accuracy - baseline
        cells = (f"{v.mean():.1f} ± {std(v):.1f}" for v in (accuracy, gain))
        row = "{:18}{:>17}{:>25}".format(method, *cells) + f"{gain.min():+14.1f}"
        print(row if method != first else row[:35])
    print("mean ± standard deviation over seeds; the gain is paired, seed by seed")


def std(values: Any) -> Any:
    """Returns the sample standard deviation over the last axis; of one value, 0."""
    return np.std(values, axis=-1, ddof=values.shape[-1] > 1)
