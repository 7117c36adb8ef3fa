"""Devices that programs are compiled for though none is here, and what chips send."""

import os
import pathlib
import re
import tempfile
from typing import Any

import jax
from jax.experimental import topologies

# From NVIDIA's device properties, in the form that XLA reads.
H100 = pathlib.Path(__file__).parent / "h100.txtpb"
COLLECTIVES = (
    "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute|"
    "ragged-all-to-all|collective-broadcast"
)


def tpus(topology: str) -> list[Any]:
    """Returns the chips of a TPU, such as v5e:2x2."""
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    }
    if "TPU_LOG_DIR" not in os.environ:
        os.environ["TPU_LOG_DIR"] = tempfile.mkdtemp()
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    return list(found.devices)


def h100s(count: int) -> list[Any]:
    """Returns so many H100s of one host."""
    jax.config.update("jax_platforms", "cpu")
    found = topologies.get_topology_desc(
        platform="cuda", target_config=H100.read_text(), topology=f"1x1x{count}"
    )
    return list(found.devices)


def collectives(text: str) -> list[tuple[str, str]]:
    """Returns (shapes, kind) of each collective in a compiled program's text."""
    return re.findall(rf"= (.*?) ({COLLECTIVES})(?:-start)?\(", text)
