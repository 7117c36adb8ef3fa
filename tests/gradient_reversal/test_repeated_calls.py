"""The layer over a long time: called often, by threads, copied, stored and reloaded."""

import concurrent.futures
import copy
import gc
import math
import os
import pickle
import subprocess
import sys
import threading
import tracemalloc

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgrl.linen
import jaxgrl.nnx
from jaxgrl import gradient_reversal

pytestmark = pytest.mark.slow

X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)


def _loss(x, scale):
    return jnp.sum(jnp.sin(gradient_reversal(x, scale)))


def _held():
    gc.collect()
    return len(jax.live_arrays()), tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize("rows", [False, True], ids=["scalar", "per example"])
def test_a_thousand_scales_compile_once_and_leave_nothing(rows):
    grad = jax.jit(jax.grad(_loss))

    def call(n):
        scale = np.full(2, n / 7, np.float32) if rows else n / 7
        return float(grad(X, scale)[0, 0])

    expected = [-n / 7 * np.cos(X[0, 0]) for n in range(1000)]
    tracemalloc.start()
    try:
        found = [call(n) for n in range(100)]
        arrays, size = _held()
        found += [call(n) for n in range(100, 1000)]
        more_arrays, more_size = _held()
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert grad._cache_size() == 1
    assert more_arrays == arrays
    # 900 numbers of 24 bytes and the list; 100 bytes more a call would be 90 kB.
    assert more_size - size < 45_000


def test_eager_scales_trace_once_and_leave_nothing():
    from jaxgrl._gradient_reversal import _gradient_reversal

    x = jnp.asarray(X)

    def call(n):
        return float(jax.grad(_loss)(x, n / 7)[0, 0])

    def right(n):
        return math.isclose(call(n), -n / 7 * np.cos(X[0, 0]), rel_tol=1e-5)

    call(1)
    traced = _gradient_reversal._cache_size()
    tracemalloc.start()
    try:
        assert all(map(right, range(100)))
        arrays, size = _held()
        assert all(map(right, range(100, 300)))
        more_arrays, more_size = _held()
    finally:
        tracemalloc.stop()
    assert _gradient_reversal._cache_size() == traced
    assert more_arrays == arrays
    assert more_size - size < 20_000  # 100 bytes a call


def test_eight_threads_that_trace_and_call_at_once():
    start, shared = threading.Barrier(8), jax.jit(jax.grad(_loss))

    def work(thread):
        start.wait(timeout=60)
        for n in range(20):
            # A shape of its own, so that each thread traces; one for all, too.
            own = np.full((2, 3 + thread), n / 9, np.float32)
            traced, eager = jax.jit(jax.grad(_loss)), jax.grad(_loss)
            for f, x in ((traced, own), (shared, X), (eager, X)):
                scale = np.float32(thread + n / 5)
                np.testing.assert_allclose(f(x, scale), -scale * np.cos(x), rtol=1e-5)
        return thread

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(work, thread) for thread in range(8)]
        assert [f.result(timeout=300) for f in futures] == list(range(8))
    assert shared._cache_size() == 1


LAYERS = {
    "function": (gradient_reversal, lambda f, x: f(x, 0.5)),
    "nnx": (jaxgrl.nnx.GradientReversal(0.5), lambda f, x: f(x)),
    "nnx, an array": (
        jaxgrl.nnx.GradientReversal(jnp.array(0.5, jnp.float32)),
        lambda f, x: f(x),
    ),
    "linen": (jaxgrl.linen.GradientReversal(0.5), lambda f, x: f.apply({}, x)),
}


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda a: pickle.loads(pickle.dumps(a))]
)
@pytest.mark.parametrize("name", LAYERS)
def test_copies_and_pickles_reverse_too(name, again):
    layer, call = LAYERS[name]
    grad = jax.grad(lambda x: jnp.sum(call(again(layer), x) ** 2))(jnp.asarray(X))
    np.testing.assert_allclose(grad, -X, rtol=1e-6)


def _run(code, *args, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_exported_step_runs_in_another_process_without_jaxgrl(tmp_path):
    grad = jax.jit(jax.value_and_grad(_loss))
    exported = jax.export.export(grad)(X, np.float32(0.3))
    (tmp_path / "step").write_bytes(exported.serialize())
    np.save(tmp_path / "x.npy", X)
    code = """
import pathlib, sys
sys.modules["jaxgrl"] = None
import jax, jax.export, numpy as np
folder = pathlib.Path(sys.argv[1])
step = jax.export.deserialize(bytearray((folder / "step").read_bytes()))
value, grad = step.call(np.load(folder / "x.npy"), np.float32(0.3))
np.savez(folder / "out.npz", value=value, grad=grad)
"""
    _run(code, tmp_path)
    out = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(out["value"], np.sin(X).sum(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(out["grad"], -0.3 * np.cos(X), rtol=1e-6)


def test_a_second_process_reads_what_the_first_compiled(tmp_path):
    code = """
import logging, sys
logging.basicConfig(stream=sys.stdout, format="%(message)s")
logging.getLogger("jax._src.compiler").setLevel(logging.DEBUG)
logging.getLogger("jax._src.compilation_cache").setLevel(logging.DEBUG)
import jax, jax.numpy as jnp
from jaxgrl import gradient_reversal
def loss(x, scale):
    return jnp.sum(jnp.sin(gradient_reversal(x, scale)))
grad = jax.jit(jax.grad(loss))
print("result", *grad(jnp.ones(3), float(sys.argv[1])).tolist())
"""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
    }
    hit = "Persistent compilation cache hit for 'jit_loss'"
    first = _run(code, 0.5, **environment)
    stored = sorted(path.name for path in tmp_path.glob("*-cache"))
    second = _run(code, 2.0, **environment)
    assert hit not in first and hit in second
    assert sorted(path.name for path in tmp_path.glob("*-cache")) == stored
    for scale, out in ((0.5, first), (2.0, second)):
        (result,) = (line for line in out.splitlines() if line.startswith("result"))
        np.testing.assert_allclose(
            [float(v) for v in result.split()[1:]], -scale * np.cos(np.ones(3)), 1e-5
        )
