r"""What a step of examples/dann_at_scale.py sends, on 4 to thousands of chips.

The claim: whatever the number of chips, the compiled step has no collective but the
all-reduce of the gradient, which has as many bytes as the parameters and the metrics.

Each topology's program is compiled and not run, with 16 pairs of images for each chip.
Bytes sent are those of a ring: a chip sends the bytes of the all-reduce nearly twice.
Exits with status 1 where the claim does not hold. Needs no TPU or GPU, but on Linux:

    pip install -e '.[benchmarks]' 'jax[tpu]'
    pip install --no-deps jax-cuda13-plugin==JAX jax-cuda13-pjrt==JAX
    python benchmarks/scale.py
    python benchmarks/scale.py --topologies v5e:2x2 h100:8

where JAX is what ``pip show jax`` says.
"""

import argparse
import importlib.util
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from parts.chips import collectives, h100s, tpus
from parts.report import Record, Row, interruptible, make_parser, print_table
from support.scale import DEFAULTS
from tqdm import tqdm

EXAMPLE = pathlib.Path(__file__).parents[1] / "examples" / "dann_at_scale.py"
PAIRS = 16  # of images on each chip
TOPOLOGIES = ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:8x8x8", "v5p:16x16x16")
TOPOLOGIES += ("h100:8",)
SIZES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "u8": 1, "pred": 1}


def chips(topology: str) -> list[Any]:
    """Returns the devices of a topology."""
    kind, _, shape = topology.partition(":")
    return h100s(int(shape)) if kind == "h100" else tpus(topology)


def byte_count(shapes: str) -> int:
    """Returns the bytes of all arrays in a text of HLO, such as (f32[2,3], f32[])."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", shapes)
    return sum(
        SIZES[dtype] * int(np.prod([int(n) for n in dims.split(",") if n]))
        for dtype, dims in found
    )


def load_example() -> Any:
    """Returns the example as a module."""
    spec = importlib.util.spec_from_file_location("dann_at_scale", EXAMPLE)
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    return example


def compile_step(
    example: Any, devices: Sequence[Any], pairs: int, **options: Any
) -> tuple[Any, Any]:
    """Returns the example's step, compiled for digits, and its state as shapes."""
    args = argparse.Namespace(**DEFAULTS | {"batch_size": pairs} | options)
    abstract, _, step, by_pair = example.make_training(args, (32, 32, 1), 10, devices)
    batch = {
        name: jax.ShapeDtypeStruct((pairs, *shape), dtype, sharding=by_pair)
        for name, shape, dtype in (
            ("images", (2, 32, 32, 1), jnp.uint8),
            ("labels", (), jnp.int32),
        )
    }
    return step.lower(abstract, batch).compile(), abstract


def measure(example: Any, topology: str) -> Row:
    """Returns what the compiled step of the example sends and holds."""
    devices = chips(topology)
    pairs = PAIRS * len(devices)
    compiled, abstract = compile_step(example, devices, pairs)
    text, memory = compiled.as_text() or "", compiled.memory_analysis()
    assert text and memory, "XLA gives no analysis of this program"
    found = collectives(text)
    reduced = sum(byte_count(shapes) for shapes, kind in found if kind == "all-reduce")
    params = jax.tree.leaves(abstract[0])
    floats = [p for p in params if jnp.issubdtype(p.dtype, jnp.floating)]
    return {
        "topology": topology,
        "chips": len(devices),
        "global batch": pairs,
        "collectives": ", ".join(kind for _, kind in found),
        "all-reduce bytes": reduced,
        "parameter bytes": sum(p.size * p.dtype.itemsize for p in floats),
        "sent bytes": round(2 * (len(devices) - 1) / len(devices) * reduced),
        "temporary bytes": memory.temp_size_in_bytes,
    }


def judge(row: Row) -> list[str]:
    """Returns where the claim fails."""
    failures = []
    if set(row["collectives"].split(", ")) != {"all-reduce"}:
        failures.append(f"{row['topology']}: collectives are {row['collectives']}")
    # The loss, its two parts and the counts of the domains come with the gradient.
    extra = row["all-reduce bytes"] - row["parameter bytes"]
    if not 0 <= extra <= 64:
        failures.append(f"{row['topology']}: {extra} bytes more than the parameters")
    return failures


def main() -> int:
    """Prints the table and the verdict; returns the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--topologies",
        nargs="+",
        default=TOPOLOGIES,
        metavar="KIND:SHAPE",
        help=f"h100:N, or a TPU's (default: {' '.join(TOPOLOGIES)})",
    )
    args = parser.parse_args()
    record = Record("scale", args.output, device="compiled")
    example, failures = load_example(), []
    for topology in tqdm(args.topologies, unit="topology", leave=False):
        row = measure(example, topology)
        record.add(row)
        failures += judge(row)
    print_table(record.rows, list(record.rows[0]))
    return record.close(f"for {len(record.rows)} topologies.", failures)


if __name__ == "__main__":
    interruptible(main)
