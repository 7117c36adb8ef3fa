"""What the layer costs in time.

The claims:

- steps: a jitted training step takes as long with the layer as with the reversal
  written by hand: the 95 % interval of the median ratio, narrower than 2 %, holds 1.00
  for small, middle and large programs. A step of a millisecond or more is not slower
  than without a layer; in one of 0.06 ms the multiplication shows. The intervals hold
  jointly for all rows (Bonferroni), and one row compares by hand with a second
  compilation of itself.
- calls: to trace and lower, a call costs at most 1.1 times what the five hand-written
  lines cost; eagerly forward, at most 0.05 times.
- growth: trace, lowering and compilation grow linearly with the calls in a program and
  the leaves of a tree, with an exponent at most 0.1 above 1 and that of the five lines;
  the eager backward of 1e7 elements or more runs at the memory bandwidth of a copy; the
  step ratio stays 1.00 from 1 to 8 devices.
- import: ``import jaxgrl`` adds at most 20 ms to ``import jax, optax``.

    python benchmarks/timing.py                         # all, about 15 minutes
    python benchmarks/timing.py --only steps import     # some
    python benchmarks/timing.py --quick                 # few rounds; no verdict

Run it on an idle machine. Pairs are interleaved in random order and every clock waits
for the device. Exits with status 1 where a claim does not hold.
"""

import argparse
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from parts.intervals import median_interval
from parts.programs import Model, Program, conv_attention, identity, mlp
from parts.report import Record, Row, interruptible, make_parser, print_table
from parts.reversals import REVERSALS
from tqdm import tqdm

WIDTH = 0.02  # of the interval of a ratio
SCALE = np.float32(0.3)


class Effort(NamedTuple):
    """How much is measured.

    Attributes:
      block: Seconds that one timing lasts at least.
      least: Rounds of a ratio, and rounds between two looks at its interval.
      most: Rounds after which the interval may stay too wide.
      share: Of the rounds of all else.
      sizes: How many models, numbers of devices, and powers of ten.
    """

    block: float = 0.004
    least: int = 200
    most: int = 6000
    share: float = 1.0
    sizes: int = 6

    def rounds(self, number: int) -> int:
        """Returns how many of so many rounds are measured."""
        return max(1, round(self.share * number))


QUICK = Effort(block=0.0, least=10, most=10, share=0.01, sizes=1)


# Clocks and statistics.
def clock(function: Callable[[], Any], repeats: int = 1) -> float:
    """Returns the seconds of one call, from so many in a row."""
    start = time.perf_counter()
    for _ in range(repeats - 1):
        function()
    jax.block_until_ready(function())
    return (time.perf_counter() - start) / repeats


def shuffled_rounds(
    clocks: dict[str, Callable[[], float]], rounds: int
) -> list[dict[str, float]]:
    """Returns rounds of timings, all clocks in each round, in random order."""
    names = list(clocks)
    found = []
    for _ in range(rounds):
        random.shuffle(names)
        found.append({name: clocks[name]() for name in names})
    return found


def median(rounds: Sequence[dict[str, float]], name: str) -> float:
    """Returns the median seconds of one clock."""
    return statistics.median(found[name] for found in rounds)


# Steps.
def step_clocks(
    model: Model, mesh: Mesh | None, block: float
) -> dict[str, Callable[[], float]]:
    """Returns a clock for the gradient of each kind."""
    program = Program(lambda dtype: model)
    layers = {
        "none": identity,
        "by hand": None,
        "by hand again": None,
        "jaxgrl": model.reverse,
    }
    arguments = (model.params, model.x, jnp.asarray(SCALE))
    if mesh is not None:
        specs = (P(), P("devices"), P())
        arguments = tuple(
            jax.device_put(a, NamedSharding(mesh, s))
            for a, s in zip(arguments, specs, strict=True)
        )
    compiled = {
        name: jax.jit(program.gradient(model, reverse)).lower(*arguments).compile()
        for name, reverse in layers.items()
    }
    for run in compiled.values():
        clock(lambda run=run: run(*arguments), 3)
    once = min(clock(lambda: compiled["none"](*arguments)) for _ in range(10))
    repeats = max(1, math.ceil(block / once))
    clocks = {
        name: lambda run=run: clock(lambda: run(*arguments), repeats)
        for name, run in compiled.items()
    }
    return clocks


def ratio(values: Sequence[float], comparisons: int) -> tuple[float, float, float]:
    """Returns the median and its 95 % interval, joint over this many comparisons."""
    low, high = median_interval(values, comparisons) or (min(values), max(values))
    return statistics.median(values), low, high


def measure_ratios(
    name: str, model: Model, mesh: Mesh | None, programs: int, effort: Effort
) -> tuple[list[Row], list[str]]:
    """Returns the rows of one program, and where the claim fails."""
    clocks = step_clocks(model, mesh, effort.block)
    pairs = (("jaxgrl", "by hand"), ("jaxgrl", "none"), ("by hand again", "by hand"))
    rounds: list[dict[str, float]] = []
    found: dict[tuple[str, str], tuple[float, float, float]] = {}
    while len(rounds) < effort.most:
        rounds += shuffled_rounds(clocks, effort.least)
        found = {
            (a, b): ratio([r[a] / r[b] for r in rounds], programs * len(pairs))
            for a, b in pairs
        }
        if all(high - low < WIDTH for _, low, high in found.values()):
            break
    rows, failures = [], []
    for (a, b), (middle, low, high) in found.items():
        rows.append(
            {
                "what": f"{name}: {a} / {b}",
                "milliseconds": 1e3 * median(rounds, b),
                "ratio": round(middle, 4),
                "low": round(low, 4),
                "high": round(high, 4),
                "rounds": len(rounds),
            }
        )
        if b == "by hand" and a != "jaxgrl" and not low <= 1 <= high:
            failures.append(f"{name}: void, {a} / {b}: {low:.4f} to {high:.4f}")
        if high - low >= WIDTH:
            failures.append(f"{name}: {a} / {b}: the interval is {high - low:.3f} wide")
        if b == "by hand" and a == "jaxgrl" and not low <= 1 <= high:
            failures.append(f"{name}: {a} / {b}: {low:.4f} to {high:.4f} has no 1.00")
        if b == "none" and low > 1 and median(rounds, b) >= 1e-3:
            failures.append(f"{name}: {a} / {b}: {low:.4f} to {high:.4f} is over 1.00")
    return rows, failures


def measure_steps(effort: Effort) -> Iterator[tuple[list[Row], list[str]]]:
    """Times a training step with the layer, by hand and without."""
    models = {
        "small, MLP 64": mlp(jnp.float32, 64),
        "middle, conv + attention": conv_attention(jnp.float32),
        "large, MLP 2048": mlp(jnp.float32, 2048),
    }
    for name, model in tqdm([*models.items()][: effort.sizes], desc="steps"):
        yield measure_ratios(name, model, None, len(models), effort)


def measure_devices(effort: Effort) -> tuple[list[Row], list[str]]:
    """Times a data-parallel step on 1 to 8 devices, virtual ones on a CPU."""
    rows, failures = [], []
    counts = [n for n in (1, 2, 4, 8) if n <= jax.device_count()][-effort.sizes :]
    for n in tqdm(counts, desc="devices"):
        mesh = Mesh(np.array(jax.devices()[:n]), ("devices",))
        name = f"MLP 256, data parallel over {n}"
        found, failed = measure_ratios(
            name, mlp(jnp.float32), mesh, len(counts), effort
        )
        rows += found
        failures += failed
    return rows, failures


# Calls.
def chain(reverse: Any, calls: int) -> Callable[..., Any]:
    """Returns the gradient of a program with so many calls of the layer."""

    # A matrix product between the calls: XLA would fuse elementwise operations into one
    # kernel, and the compilation of that is anything but linear.
    def loss(x, scale):
        matrix = jnp.full((X.shape[1],) * 2, scale)
        for _ in range(calls):
            x = reverse(x, scale) @ matrix
        return jnp.sum(x)

    return jax.grad(loss)


def leaves(reverse: Any, count: int) -> Callable[..., Any]:
    """Returns the gradient of a program whose layer takes a tree of so many leaves."""

    def loss(x, scale):
        tree = reverse({f"{i}": jnp.tanh(x * i) for i in range(count)}, scale)
        return sum(jnp.sum(leaf) for leaf in tree.values())

    return jax.grad(loss)


def dann_step(reverse: Any, calls: int) -> Callable[..., Any]:
    """Returns the gradient of a DANN with an MLP; calls is 1."""
    del calls
    model = mlp(jnp.float32, 64)
    gradient = Program(mlp).gradient(model, reverse)
    return lambda x, scale: gradient(model.params, x, scale)


X = np.ones((64, 64), np.float32)


def build(make: Any, reverse: Any, size: int, compile_too: bool) -> dict[str, float]:
    """Returns the seconds that tracing, lowering and compiling a program take."""
    program = make(reverse, size)
    marks = [time.perf_counter()]
    traced = jax.jit(lambda x, scale: program(x, scale)).trace(X, SCALE)
    marks.append(time.perf_counter())
    lowered = traced.lower()
    marks.append(time.perf_counter())
    trace, lower = (b - a for a, b in itertools.pairwise(marks))
    found = {"trace": trace, "lower": lower, "trace + lower": trace + lower}
    if compile_too:
        lowered.compile()
        found["compile"] = time.perf_counter() - marks[-1]
    return found


def build_times(
    make: Any, size: int, rounds: int, layers: Sequence[str], *, cold: bool = False
) -> dict[str, dict[str, float]]:
    """Returns layer -> stage -> median seconds, the layers interleaved.

    Compilation, which takes far longer and varies less, is timed in a tenth of the
    rounds.
    """
    compiling = min(rounds, max(3, rounds // 10))

    def clocked(layer, i):
        if cold:
            jax.clear_caches()
        return build(make, REVERSALS.get(layer, identity), size, i < compiling)

    found: dict[str, dict[str, list[float]]] = {layer: {} for layer in layers}
    for i in range(-1, rounds):  # round -1 fills the caches
        for layer in random.sample(layers, len(layers)):
            for stage, seconds in clocked(layer, i).items():
                if i >= 0:
                    found[layer].setdefault(stage, []).append(seconds)
    return {
        layer: {stage: statistics.median(v) for stage, v in stages.items()}
        for layer, stages in found.items()
    }


def call_row(what: str, times: dict[str, float]) -> Row:
    """Returns a row of milliseconds: without a layer, jaxgrl and the five lines."""
    row: Row = {"what": what}
    row |= {f"{layer}, ms": 1e3 * seconds for layer, seconds in times.items()}
    return row | {"ratio": round(times["jaxgrl"] / times["five lines"], 3)}


LAYERS = ("none", "jaxgrl", "five lines")


def measure_calls(effort: Effort) -> tuple[list[Row], list[str]]:
    """Times what a call costs before the program runs, and eagerly."""
    rows, failures = [], []

    def add(what, times, bound=None):
        rows.append(call_row(what, times))
        if bound and not 0 < rows[-1]["ratio"] <= bound:
            failures.append(f"{what}: {rows[-1]['ratio']} of the five lines")

    more = 10 if effort is QUICK else 100
    with tqdm(total=5, desc="calls") as bar:
        built = {}
        for what, make, size, rounds, cold in (
            ("DANN step", dann_step, 1, 200, False),
            ("DANN step, caches cleared", dann_step, 1, 20, True),
            ("one call and a product", chain, 1, 200, False),
            ("more of them", chain, 1 + more, 40, False),
        ):
            rounds = effort.rounds(rounds)
            built[what] = build_times(make, size, rounds, LAYERS, cold=cold)
            bar.update()
        one, many = built["one call and a product"], built.pop("more of them")
        for what, times in built.items():
            for stage in times["none"]:
                bound = 1.1 if (what, stage) == ("DANN step", "trace + lower") else None
                add(f"{what}: {stage}", {k: times[k][stage] for k in LAYERS}, bound)
        for stage in one["none"]:
            # The product of each step is in all three, so that it cancels.
            step = {k: (many[k][stage] - one[k][stage]) / more for k in LAYERS}
            calls = {k: step[k] - step["none"] for k in LAYERS}
            bound = 1.1 if stage == "trace + lower" else None
            add(f"one more call: {stage}", calls, bound)
        for what, times in eager_times(effort).items():
            add(what, times, 0.05 if what == "eager forward" else None)
        bar.update()
    return rows, failures


def eager_times(effort: Effort) -> dict[str, dict[str, float]]:
    """Returns the median seconds of eager calls."""
    x, scale = jnp.asarray(X), jnp.asarray(SCALE)

    def forward(reverse):
        return lambda: clock(lambda: reverse(x, scale), 100)

    def gradient(reverse):
        grad = jax.grad(lambda x: jnp.sum(reverse(x, scale)))
        return lambda: clock(lambda: grad(x), 20)

    found = {}
    for what, make in (("eager forward", forward), ("eager gradient", gradient)):
        clocks = {layer: make(REVERSALS.get(layer, identity)) for layer in LAYERS}
        rounds = shuffled_rounds(clocks, effort.rounds(100) + 1)[1:]
        found[what] = {layer: median(rounds, layer) for layer in LAYERS}
    return found


# Growth.
def exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Returns the slope of a line through the points on logarithmic axes."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def measure_programs(
    what: str, make: Any, sizes: Sequence[int], effort: Effort
) -> tuple[list[Row], list[str]]:
    """Times tracing, lowering and compiling over the size of the program."""
    layers = ("none", "jaxgrl", "five lines" if make is chain else "whole tree")
    stages = ("trace + lower", "compile")
    found = {}
    for size in tqdm(sizes, desc=what, leave=False):
        found[size] = build_times(
            make, size, effort.rounds(20 if size < 100 else 3), layers
        )
    rows: list[Row] = [
        {"what": f"{size} {what}: {layer}"}
        | {f"{s}, ms": 1e3 * found[size][layer][s] for s in stages}
        for size in sizes
        for layer in layers
    ]
    failures = []
    large = sizes[1:] if len(sizes) > 2 else sizes
    slopes = {
        layer: [exponent(large, [found[n][layer][s] for n in large]) for s in stages]
        for layer in layers
    }
    for layer in layers:
        rows.append(
            {"what": f"exponent over {what}, from 10: {layer}"}
            | {f"{s}, exponent": e for s, e in zip(stages, slopes[layer], strict=True)}
        )
    for stage, ours, plain, theirs in zip(
        stages, slopes["jaxgrl"], slopes["none"], slopes[layers[2]], strict=True
    ):
        if ours > max(1, plain, theirs) + 0.1:
            failures.append(
                f"{what}: {stage} grows with exponent {ours:.2f}, without the layer "
                f"{plain:.2f}, {layers[2]} {theirs:.2f}"
            )
    return rows, failures


def copy_rate(count: int, rounds: int) -> tuple[dict[str, float], float]:
    """Returns bytes a second of eager backwards and of a copy, and the share of it."""
    scale, ct = jnp.asarray(SCALE), jnp.ones(count, jnp.float32)
    copy = jax.jit(jnp.copy)
    calls = {"copy": lambda: copy(ct)}
    for layer in ("jaxgrl", "five lines"):
        pull = jax.vjp(lambda x, r=REVERSALS[layer]: r(x, scale), ct)[1]
        calls[layer] = lambda pull=pull: pull(ct)
    repeats = max(1, 10**5 // count)
    clocks = {
        name: lambda call=call: clock(call, repeats) for name, call in calls.items()
    }
    found = shuffled_rounds(clocks, rounds + 1)[1:]
    # A copy and a reversal both read every element once and write it once.
    rate = {name: 2 * ct.nbytes / median(found, name) for name in clocks}
    return rate, statistics.median(r["copy"] / r["jaxgrl"] for r in found)


def measure_bandwidth(effort: Effort) -> tuple[list[Row], list[str]]:
    """Times the eager backward over the number of elements, beside a plain copy."""
    rows, failures = [], []
    for power in tqdm(range(3, 9)[: effort.sizes], desc="elements", leave=False):
        rounds = effort.rounds(20 if power == 8 else 60)
        rate, share = copy_rate(10**power, rounds)
        row: Row = {"what": f"eager backward of 1e{power} elements"}
        row |= {f"{name}, GB/s": value / 1e9 for name, value in rate.items()}
        rows.append(row | {"share of a copy": round(share, 3)})
        if power >= 7 and share < 0.9:
            failures.append(f"1e{power} elements: {share:.2f} of the rate of a copy")
    return rows, failures


def measure_growth(effort: Effort) -> Iterator[tuple[list[Row], list[str]]]:
    """Times over the number of elements, calls and leaves."""
    sizes = (1, 10, 100, 1000)[: effort.sizes + 1]
    yield measure_bandwidth(effort)
    yield measure_programs("calls", chain, sizes, effort)
    yield measure_programs("leaves", leaves, sizes, effort)


# Import.
IMPORT = """
import time, jax, optax
start = time.perf_counter()
import jaxgrl
print(time.perf_counter() - start)
"""


def measure_import(effort: Effort) -> tuple[list[Row], list[str]]:
    """Times what importing the package adds, each time in a new process."""
    seconds = []
    for _ in tqdm(range(effort.rounds(20)), desc="import"):
        command = [sys.executable, "-c", IMPORT]
        printed = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(float(printed.stdout))
    middle = 1e3 * statistics.median(seconds)
    row = {"what": "import jaxgrl, after jax and optax", "milliseconds": middle}
    low, high = median_interval(seconds) or (min(seconds), max(seconds))
    failures = [f"import: {middle:.1f} ms, over 20"] if middle > 20 else []
    return [row | {"low": 1e3 * low, "high": 1e3 * high}], failures


def in_subprocess(section: str, effort: Effort) -> tuple[list[Row], list[str]]:
    """Measures a section in a process of its own, with eight virtual CPU devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=8"
    command = [sys.executable, __file__, "--worker", section]
    command += ["--quick"] * (effort is QUICK)
    done = subprocess.run(
        command,
        env=os.environ | {"XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        check=True,
    )
    return tuple(json.loads(done.stdout))


# Each section gives its rows, and where the claim fails, in one part or several.
MEASURES: dict[str, Callable[[Effort], Iterable[tuple[list[Row], list[str]]]]] = {
    "steps": measure_steps,
    "calls": lambda effort: [measure_calls(effort)],
    "growth": measure_growth,
    "devices": lambda effort: [in_subprocess("devices", effort)],
    "import": lambda effort: [measure_import(effort)],
}


def main() -> None:
    """Prints a table for each section and the verdict."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=MEASURES, default=list(MEASURES), help="sections")
    add("--quick", action="store_true", help="a smoke run: judges nothing")
    add("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    effort = QUICK if args.quick else Effort()
    if args.worker:
        print(json.dumps(measure_devices(effort)))
        return
    kind = jax.devices()[0].device_kind
    record = Record("timing", args.output, device=None if kind == "cpu" else kind)
    failures = []
    for section in args.only:
        rows = []
        for found, failed in MEASURES[section](effort):
            for row in found:
                record.add({"section": section} | row)
            rows += found
            failures += [] if args.quick else failed
        print(f"\n{section}")
        print_table(rows, list(dict.fromkeys(key for row in rows for key in row)))
    claim = None if args.quick else f"{', '.join(args.only)}."
    sys.exit(record.close(claim, failures))


if __name__ == "__main__":
    interruptible(main)
