r"""What is left of the layer in a compiled program.

The claim: under ``jit`` the layer is the one multiplication that you would write by
hand, and forward it is nothing.

- Forward, the program with the layer has the same operations, flops, bytes and
  temporary bytes as the program without it, and computes the same bits.
- Backward, the program is in no column worse than the reversal written out by hand (one
  vjp for the heads, one multiplication, one vjp for the features), which is the
  limit, or in none worse than a rule by hand, which some compilers schedule otherwise;
  and its gradients have the same bits.
- On several devices, it has the same collectives as by hand, in the same order.

The price of being right at every order of differentiation: what comes out of the layer
is a value of its own. Where the layer is inside the body of a scan, and the same
features feed another head there, the scan keeps both, so that the features are held
twice (the program "GRU, layer in the scan"); a rule of first order holds them once. The
same is true of the residuals of a vjp that is not under ``jit``. Both are shown, and at
most one more copy of the features is allowed. (Of that program, only temporary and
residual bytes are judged backward.)

Exact counts from XLA's own analysis, no clocks. Every program is compiled without the
layer, by hand, with jaxgrl and with what people use today. Exits with status 1 where
the claim does not hold.

    python benchmarks/overhead.py                      # what runs here, CPU or GPU
    python benchmarks/overhead.py --quick              # a few programs
    python benchmarks/overhead.py --backend tpu-aot    # compiled, not run, for 7 TPUs
    python benchmarks/overhead.py --backend cuda-aot   # compiled, not run, for H100

The last two need no such hardware, but an environment of their own on Linux:

    pip install -e '.[benchmarks]' 'jax[tpu]'
    pip install -e '.[benchmarks]' && \
        pip install --no-deps jax-cuda13-plugin==JAX jax-cuda13-pjrt==JAX

where JAX is what ``pip show jax`` says. They compile for 4 chips, data parallel.
"""

import concurrent.futures
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Var
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from parts.chips import collectives, h100s, tpus
from parts.counts import AGAINST, COLUMNS, FORWARD, Counts, to_row
from parts.programs import (
    PROGRAMS,
    SCALES,
    SWEEP,
    Model,
    adam_step,
    identity,
    make_arguments,
    make_loss_in_scan,
    one_rule,
    sweep,
)
from parts.report import Record, interruptible, make_parser, print_table
from parts.reversals import REVERSALS
from tqdm import tqdm

TPUS = {
    "v2": "v2:2x2",
    "v3": "v3:2x2",
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
OTHERS = ("five lines", "stop_gradient trick", "optax.scale_gradient")
BACKWARD = (*FORWARD, "residual bytes")


class Case(NamedTuple):
    """A program, a dtype, how the scale reaches the layer, and whether on a mesh."""

    program: str
    dtype: str
    scale: str
    sharded: bool

    def __str__(self) -> str:
        """Returns the name that tables give it."""
        return f"{self.program}, {self.dtype}, {self.scale}" + (
            ", data parallel" if self.sharded else ""
        )


def make_cases(*, quick: bool, compiled_only: bool, several: bool) -> list[Case]:
    """Returns the cases; what is only compiled is always data parallel."""
    if quick:
        cases = [
            Case("MLP", "float32", "traced", compiled_only),
            Case("conv + attention", "bfloat16", "per example", compiled_only),
            Case("NNX, Adam step, donated", "bfloat16", "scheduled", compiled_only),
        ]
        return [*cases, *[Case("MLP", "bfloat16", "traced", True)] * several]
    pairs = ("float32", "traced"), ("bfloat16", "per example")
    parallel = [Case(name, *pair, True) for name in PROGRAMS for pair in pairs]
    if compiled_only:
        return parallel
    pairs = (*pairs, ("float32", "Python number"), ("bfloat16", "scheduled"))
    return parallel * several + [
        Case(name, *pair, False)
        for name in PROGRAMS
        for pair in pairs
        if PROGRAMS[name].setting is not sweep or "Python number" not in pair
    ]


def place(case: Case, arguments: Any, mesh: Mesh | None) -> Any:
    """Returns (state, x, argument) as shapes with their shardings."""
    if mesh is None:
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arguments)
    state, x, argument = arguments
    example = P("devices") if case.scale == "per example" else P()
    if PROGRAMS[case.program].setting is sweep:
        example = P(None, *example)

    def shapes(tree, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), tree
        )

    return shapes(state, P()), shapes(x, P("devices")), shapes(argument, example)


def measure(program: Any, shapes: Any, donate: bool) -> tuple[dict[str, Any], Any]:
    """Returns XLA's counts for the compiled program, and the program."""
    jitted = jax.jit(program, keep_unused=True, donate_argnums=(0,) if donate else ())
    compiled = jitted.lower(*shapes).compile()
    text = compiled.as_text() or ""
    cost = compiled.cost_analysis() or {}  # None for CUDA ahead of time
    memory = compiled.memory_analysis()
    assert text and memory, "XLA gives no analysis of this backend's programs"
    counts = {
        "ops": sum(" = " in line for line in text.splitlines()),
        "fusions": text.count(" fusion("),
        "flops": int(cost["flops"]) if "flops" in cost else None,
        "bytes": int(cost["bytes accessed"]) if "bytes accessed" in cost else None,
        "copies": text.count(" copy("),
        "temp bytes": memory.temp_size_in_bytes,
        "collectives": [" ".join(found) for found in collectives(text)],
    }
    return counts, compiled


def residual_bytes(vjp: Any, shapes: Any) -> int:
    """Returns the bytes that a vjp holds between forward and backward."""
    jaxpr = jax.make_jaxpr(lambda *shapes: jax.tree.leaves(vjp(*shapes)[1]))(*shapes)
    # What several rules keep is held once.
    pairs = zip(jaxpr.jaxpr.outvars, jaxpr.out_avals, strict=True)
    held: dict[Var, Any] = {v: aval for v, aval in pairs if isinstance(v, Var)}
    return sum(aval.size * aval.dtype.itemsize for aval in held.values())


class Spelling(NamedTuple):
    """A program as one implementation spells it; ``vjp`` gives its residuals."""

    part: str
    layer: str
    program: Any
    vjp: Any = None


def spell(case: Case, model: Model) -> list[Spelling]:
    """Returns the programs of one case, those that are the measure before others."""
    program = PROGRAMS[case.program]
    make_scale = SCALES[case.scale][1]

    def lift(function):
        def lifted(state, x, argument):
            params = state[0] if program.setting is adam_step else state
            return function(params, x, make_scale(argument))

        return jax.vmap(lifted, (0, None, 0)) if program.setting is sweep else lifted

    def forward(layer, reverse):
        loss = program.make_loss(model, reverse, program.around)
        return Spelling("forward", layer, lift(loss))

    def gradient(layer, reverse):
        whole = program.setting(program.gradient(model, reverse), make_scale)
        vjp = lift(program.value_and_pull(model, reverse))
        return Spelling("gradient", layer, whole, vjp)

    return [
        forward("none", identity),
        forward("jaxgrl", model.reverse),
        gradient("none", identity),
        gradient("by hand", None),
        gradient("by hand, one rule", one_rule),
        gradient("jaxgrl", model.reverse),
        *(gradient(name, REVERSALS[name]) for name in OTHERS),
    ]


def same_bits(a: Any, b: Any) -> bool:
    """Returns whether two pytrees hold the same bits."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs)


def compare(case: Case, mesh: Mesh | None, run: bool) -> dict[str, Any]:
    """Returns the counts of one case: part -> layer -> column -> count."""
    program = PROGRAMS[case.program]
    model = program.build(jnp.dtype(case.dtype))
    arguments = make_arguments(program, model, case.scale)
    shapes = place(case, arguments, mesh)
    counts: dict[str, Any] = {"forward": {}, "gradient": {}}
    oracles = {}
    for part, layer, function, vjp in spell(case, model):
        donate = part == "gradient" and program.setting is adam_step
        try:
            found, compiled = measure(function, shapes, donate)
            if vjp:
                found["residual bytes"] = residual_bytes(vjp, shapes)
        except Exception as error:
            if layer not in OTHERS:
                raise
            counts[part][layer] = {"error": type(error).__name__}
            continue
        if run:
            # Copies, since a donated argument is gone afterwards.
            copies = jax.tree.map(
                lambda a, s: jax.device_put(np.array(a), s.sharding), arguments, shapes
            )
            value = jax.tree.map(np.asarray, compiled(*copies))
            if layer == AGAINST[part]:
                oracles[part] = value
            elif part in oracles:
                found["same bits"] = same_bits(value, oracles[part])
        counts[part][layer] = found
    return counts


def compare_all(
    cases: Sequence[Case], mesh: Mesh, run: bool
) -> Iterator[dict[str, Any]]:
    """Yields the counts of the cases in their order; all cores compile."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        found = [
            pool.submit(compare, case, mesh if case.sharded else None, run)
            for case in cases
        ]
        try:
            for future in found:
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def kept_bytes(case: Case) -> int:
    """Returns the bytes of one more copy of the features.

    With it come the index of the tie and, in a loop, a pointer: 16 bytes each.
    """
    model = PROGRAMS[case.program].build(jnp.dtype(case.dtype))
    features = jax.eval_shape(model.features, model.params["features"], model.x)
    runs = SWEEP if PROGRAMS[case.program].setting is sweep else 1
    leaves = jax.tree.leaves(features)
    return runs * sum(h.size * h.dtype.itemsize + 16 for h in leaves)


def worse_than(
    part: str, ours: Counts, limit: Counts, allowed: dict[str, int]
) -> list[str]:
    """Returns the columns in which one program is worse than another."""
    found = []
    for column in FORWARD if part == "forward" else allowed:
        a, b = ours[column], limit[column]
        if a is None:
            continue
        if a != b if part == "forward" else a > b + allowed[column]:
            found.append(f"{column}: {a}, not {b}")
    if ours["collectives"] != limit["collectives"]:
        found.append(f"collectives: {ours['collectives']}, not {limit['collectives']}")
    return found


def judge(case: Case, counts: dict[str, dict[str, Counts]]) -> list[str]:
    """Returns where the claim fails."""
    allowed: dict[str, int] = dict.fromkeys(BACKWARD, 0)
    allowed["residual bytes"] = kept_bytes(case)
    if PROGRAMS[case.program].make_loss is make_loss_in_scan:
        kept = kept_bytes(case)
        allowed = {"temp bytes": kept, "residual bytes": kept}
    forward, gradient = counts["forward"], counts["gradient"]
    failures = worse_than("forward", forward["jaxgrl"], forward["none"], allowed)
    ours, by_hand = gradient["jaxgrl"], gradient["by hand"]
    worse = worse_than("gradient", ours, by_hand, allowed)
    if worse_than("gradient", ours, gradient["by hand, one rule"], allowed):
        failures += worse
    if case.sharded and not by_hand["collectives"]:
        failures.append("no collective was found in a data-parallel gradient")
    for part, found in (("forward", forward["jaxgrl"]), ("gradient", ours)):
        if not found.get("same bits", True):
            failures.append(f"{part}: other bits")
    return [f"{case}: {failure}" for failure in failures]


def difference(ours: dict[str, Any], limit: dict[str, Any]) -> str:
    """Returns in words by how much one program is worse than another."""
    if "error" in ours:
        return ours["error"]
    worse = []
    for column in ("fusions", "copies"):
        if ours[column] != limit[column]:
            worse.append(f"{ours[column] - limit[column]:+d} {column}")
    for column in ("flops", "bytes", "temp bytes", "residual bytes"):
        a, b = ours.get(column), limit.get(column)
        if a is not None and a != b:
            worse.append(
                f"{100 * (a - b) / b:+.2g} % {column}" if b else f"+{a} {column}"
            )
    if not worse and ours["ops"] != limit["ops"]:
        worse.append(f"{ours['ops'] - limit['ops']:+d} ops")
    if ours["collectives"] != limit["collectives"]:
        worse.append("other collectives")
    if not ours.get("same bits", True):
        worse.append("other bits")
    return ", ".join(worse) or "equal"


def table_row(case: Case, counts: dict[str, Any]) -> dict[str, Any]:
    """Returns one line of the table: by hand in numbers, others by the difference."""
    limit = counts["gradient"]["by hand"]
    row: dict[str, Any] = {"case": str(case)}
    row |= {column: limit[column] for column in BACKWARD if limit[column] is not None}
    row["collectives"] = len(limit["collectives"])
    forward = counts["forward"]
    row["forward"] = difference(forward["jaxgrl"], forward["none"])
    for layer in ("jaxgrl", "by hand, one rule", "none", *OTHERS):
        row[layer] = difference(counts["gradient"][layer], limit)
    return row


def targets(
    backend: str, names: Sequence[str]
) -> Iterator[tuple[str, list[Any], bool]]:
    """Yields (name, devices, whether programs run there)."""
    if backend == "tpu-aot":
        for name in names:
            yield f"tpu {name} compiled", tpus(TPUS[name]), False
    elif backend == "cuda-aot":
        yield "h100 compiled", h100s(4), False
    else:
        devices = jax.devices(backend)
        yield devices[0].device_kind, devices, True


def main() -> None:
    """Prints a table for each device and the verdict."""
    parser = make_parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="a few programs")
    parser.add_argument(
        "--backend",
        default="cpu",
        choices=("cpu", "gpu", "tpu", "tpu-aot", "cuda-aot"),
        help="what to compile for (default: cpu)",
    )
    parser.add_argument(
        "--tpus",
        nargs="+",
        default=list(TPUS),
        choices=TPUS,
        help="the generations that tpu-aot compiles for (default: all)",
    )
    args = parser.parse_args()
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    )
    if args.backend == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if args.backend == "gpu":  # else two compilations of one program differ in bits
        os.environ["XLA_FLAGS"] += " --xla_gpu_deterministic_ops=true"
        os.environ["XLA_FLAGS"] += " --xla_gpu_autotune_level=0"

    status = 0
    for name, devices, run in targets(args.backend, args.tpus):
        record = Record(
            "overhead", args.output, device=None if args.backend == "cpu" else name
        )
        record.data["counts"] = COLUMNS
        mesh = Mesh(np.array(devices), ("devices",))
        several = len(devices) > 1
        cases = make_cases(quick=args.quick, compiled_only=not run, several=several)
        rows, failed = [], []
        bar = tqdm(cases, desc=name, unit="case", leave=False)
        for case, counts in zip(bar, compare_all(cases, mesh, run), strict=True):
            record.add(to_row(case._asdict(), counts))
            rows.append(table_row(case, counts))
            failed += judge(case, counts)
            if len(rows) % 20 == 0:
                jax.clear_caches()  # else a thousand compiled programs pile up
        columns = list(dict.fromkeys(column for row in rows for column in row))
        print(
            f"\nGradient by hand on {name}, {len(devices)} devices where data parallel:"
        )
        print_table(rows, columns)
        status |= record.close(f"in all {len(cases)} cases.", failed)
    sys.exit(status)


if __name__ == "__main__":
    interruptible(main)
