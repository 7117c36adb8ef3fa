"""What is left of the layer in a compiled program.

The claim: under ``jit`` the layer is the one multiplication that you would write by
hand, and forward it is nothing.

- Forward, the program with the layer has the same operations, flops and bytes as the
  program without it, and computes the same bits.
- Backward, the program has no more fusions, flops, bytes, copies and temporary bytes
  than the reversal written out by hand (one vjp for the heads, one multiplication, one
  vjp for the features), which is the physical limit; and its gradients have the same
  bits.

Exact counts from XLA's own analysis on this machine's backend, no clocks. Exits with
status 1 where the claim does not hold.

    python benchmarks/overhead.py
"""

import argparse
import importlib.metadata
import os
import pathlib
import platform
import shlex
import sys

import jax
import jax.numpy as jnp
import optax
from jax import lax

import jaxgrl

BATCH = 64
FORWARD = ("ops", "flops", "bytes")
BACKWARD = ("fusions", "flops", "bytes", "copies", "temp bytes")


# The models: features(params, x), and two heads on them, head(params, features).
def mlp_features(params, x):
    """Returns [batch, 256]."""
    return jnp.tanh(jax.nn.relu(x @ params["a"]) @ params["b"])


def conv_attention_features(params, x):
    """Returns [batch, 64, 32]: a convolution, then self-attention over its pixels."""
    dims = ("NHWC", "HWIO", "NHWC")
    h = lax.conv_general_dilated(
        x, params["kernel"], (2, 2), "SAME", dimension_numbers=dims
    )
    h = jax.nn.relu(h).reshape(len(x), -1, h.shape[-1])
    q, k, v = (h @ params[name] for name in "qkv")
    attention = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", q, k))
    return h + jnp.einsum("bqk,bkc->bqc", attention, v)


def head(params, features):
    """Returns logits [batch, K], from features pooled over all axes between."""
    pooled = features.mean(axis=tuple(range(1, features.ndim - 1)))
    return jax.nn.relu(pooled @ params["a"]) @ params["b"]


def weights(key, dtype, **shapes):
    """Returns random parameters of these shapes."""
    keys = jax.random.split(key, len(shapes))
    return {
        name: (jax.random.normal(k, shape) / 8).astype(dtype)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def make_model(name, dtype):
    """Returns (features, params, x) of one model."""
    keys = jax.random.split(jax.random.key(0), 4)
    if name == "MLP":
        features, width, shape = mlp_features, 256, (256,)
        params = weights(keys[0], dtype, a=(256, 256), b=(256, 256))
    else:
        features, width, shape = conv_attention_features, 32, (16, 16, 3)
        maps = {"q": (32, 32), "k": (32, 32), "v": (32, 32)}
        params = weights(keys[0], dtype, kernel=(3, 3, 3, 32), **maps)
    params = {
        "features": params,
        "label": weights(keys[1], dtype, a=(width, 64), b=(64, 10)),
        "domain": weights(keys[2], dtype, a=(width, 64), b=(64, 1)),
    }
    x = jax.random.normal(keys[3], (BATCH, *shape)).astype(dtype)
    return features, params, x


def label_loss(params, h):
    """Returns the cross entropy on labels that are made up."""
    labels = jnp.arange(BATCH) % 10
    losses = optax.softmax_cross_entropy_with_integer_labels
    return losses(head(params, h).astype(jnp.float32), labels).mean()


def domain_loss(params, h):
    """Returns the loss of the domain discriminator, half source and half target."""
    return jaxgrl.domain_loss(head(params, h), jnp.arange(BATCH) >= BATCH // 2)


# The programs that are compared. All take (params, x, scale).
def make_forward(features, reverse):
    """Returns the program that computes both heads' logits."""

    def forward(params, x, scale):
        h = features(params["features"], x)
        domain_logits = head(params["domain"], reverse(h, scale))
        return head(params["label"], h), domain_logits

    return forward


def make_gradient(features, reverse):
    """Returns the program that computes the gradient by one jax.grad."""

    def loss(params, x, scale):
        h = features(params["features"], x)
        reversed_h = reverse(h, scale)
        return label_loss(params["label"], h) + domain_loss(
            params["domain"], reversed_h
        )

    return jax.grad(loss)


def make_gradient_by_hand(features):
    """Returns the program with the reversal written out: vjp, multiplication, vjp."""

    def gradient(params, x, scale):
        h, pull = jax.vjp(lambda p: features(p, x), params["features"])
        label, label_ct = jax.grad(label_loss, argnums=(0, 1))(params["label"], h)
        domain, domain_ct = jax.grad(domain_loss, argnums=(0, 1))(params["domain"], h)
        column = scale.reshape(scale.shape + (1,) * (h.ndim - scale.ndim))
        product = -column * domain_ct.astype(jnp.float32)
        (ct,) = pull(label_ct + product.astype(h.dtype))
        return {"features": ct, "label": label, "domain": domain}

    return gradient


def identity(h, scale):
    """Returns h: no layer at all."""
    del scale
    return h


def measure(program, *arguments):
    """Returns XLA's counts for the compiled program, and what it computes."""
    compiled = jax.jit(program, keep_unused=True).lower(*arguments).compile()
    text, cost = compiled.as_text() or "", compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    assert memory, "XLA gives no analysis of this backend's programs"
    counts = {
        "ops": sum(" = " in line for line in text.splitlines()),
        "fusions": text.count(" fusion("),
        "flops": int(cost["flops"]),
        "bytes": int(cost["bytes accessed"]),
        "copies": text.count(" copy("),
        "temp bytes": memory.temp_size_in_bytes,
    }
    return counts, compiled(*arguments)


def same_bits(a, b):
    """Returns whether two pytrees hold the same bits."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and x.tobytes() == y.tobytes() for x, y in pairs)


def compare(name, dtype, per_example):
    """Returns the rows of one case for the table, and where the claim fails."""
    features, params, x = make_model(name, dtype)
    scale = jnp.linspace(0.1, 1.0, BATCH) if per_example else jnp.float32(0.3)
    case = (
        f"{name}, {jnp.dtype(dtype).name}, {'per example' if per_example else 'scalar'}"
    )
    rows, failures = [], []

    def run(label, program):
        counts, value = measure(program, params, x, scale)
        rows.append((case, label, counts))
        return counts, value

    without, plain = run("forward, no layer", make_forward(features, identity))
    counts, value = run(
        "forward, jaxgrl", make_forward(features, jaxgrl.gradient_reversal)
    )
    for column in FORWARD:
        if counts[column] != without[column]:
            failures.append(f"{case}: forward {column} differ from no layer")
    counts["same bits"] = same_bits(value, plain)
    if not counts["same bits"]:
        failures.append(f"{case}: forward has other bits than no layer")

    run("gradient, no layer", make_gradient(features, identity))
    limit, expected = run("gradient, by hand", make_gradient_by_hand(features))
    gradient = make_gradient(features, jaxgrl.gradient_reversal)
    counts, value = run("gradient, jaxgrl", gradient)
    for column in BACKWARD:
        if counts[column] > limit[column]:
            failures.append(f"{case}: gradient {column} are more than by hand")
    counts["same bits"] = same_bits(value, expected)
    if not counts["same bits"]:
        failures.append(f"{case}: the gradient has other bits than by hand")
    return rows, failures


def processor():
    """Returns the name of the processor."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def main():
    """Prints the table and the verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()

    cases = [
        (name, dtype, per_example)
        for name in ("MLP", "conv + attention")
        for dtype in (jnp.float32, jnp.bfloat16)
        for per_example in (False, True)
    ]
    columns = ("ops", "fusions", "flops", "bytes", "copies", "temp bytes", "same bits")
    print(f"{'':60}" + "".join(f"{column:>12}" for column in columns))
    failures = []
    for case in cases:
        rows, failed = compare(*case)
        failures += failed
        for name, label, counts in rows:
            cells = "".join(f"{counts.get(column, '')!s:>12}" for column in columns)
            print(f"{name:40}{label:20}{cells}", flush=True)

    print(f"\n{shlex.join([pathlib.Path(sys.executable).name, *sys.argv])}")
    print(f"{jax.devices()[0].device_kind}: {processor()}, {platform.platform()}")
    print(
        f"Python {platform.python_version()}, jaxgrl {jaxgrl.__version__}, "
        f"jax {jax.__version__}, jaxlib {importlib.metadata.version('jaxlib')}, "
        f"optax {optax.__version__}"
    )
    if failures:
        sys.exit("The claim does not hold:\n" + "\n".join(failures))
    print(f"The claim holds in all {len(cases)} cases.")


if __name__ == "__main__":
    main()
