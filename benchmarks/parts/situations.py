"""Situations in which people differentiate a gradient reversal, and what is right.

Each is a function that takes an implementation, ``reverse(x, scale)``, and returns two
trees: what came out of it, and what is right. What is right comes from ordinary
autodiff of functions without any custom rule: the gradient at the reversed point,
multiplied by -scale in float64 and rounded once, or an explicit loop of such gradients.
An expected dtype, shape, number of traces or refusal is part of right.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from jax import lax
from jax.experimental import checkify, jet
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgrl import gradient_reversal

Reversal = Callable[[Any, Any], Any]
Run = Callable[[Reversal], tuple[Any, Any]]
REFUSED = "refused"


class Situation(NamedTuple):
    """What a user was doing.

    Attributes:
      group: One of GROUPS.
      name: The situation, in the words of the field.
      run: Takes an implementation; returns what came out, and what is right.
      exact: Whether bits must agree, and not just values to the precision of the dtype.
      excerpt: Whether the README shows it.
      limit: Where it is a known limit of jaxgrl, how the text of jaxgrl's cell begins.
    """

    group: str
    name: str
    run: Run
    exact: bool = False
    excerpt: bool = False
    limit: str = ""


# By how likely a user meets them: what every DANN does; what most training code adds to
# it (Flax, 16 bits, a strength for each example, features that are a tree, loops); what
# experiments and large runs add; the rare; the mistaken. Within a group likewise.
GROUPS = (
    "every DANN",
    "Flax and optax",
    "mixed precision",
    "per-example scale",
    "trees",
    "loops and checkpoints",
    "sweeps and vmap",
    "higher order",
    "forward mode, asked for",
    "several devices",
    "tools",
    "rare inputs",
    "mistakes to refuse",
    "known limits",
)
SITUATIONS: list[Situation] = []


def _group(group: str) -> Callable[..., Callable[[Run], Run]]:
    def situation(name: str, **fields: Any) -> Callable[[Run], Run]:
        def register(run: Run) -> Run:
            SITUATIONS.append(Situation(group, name, run, **fields))
            return run

        return register

    return situation


(
    every_dann,
    flax_and_optax,
    mixed_precision,
    per_example,
    trees,
    loops,
    sweeps,
    higher_order,
    forward_mode,
    devices,
    tools,
    rare_inputs,
    mistakes,
    known_limits,
) = map(_group, GROUPS)

S = np.float32(0.3)  # no power of two, so that roundings show
SCALES = np.array([1.0, 2.0, 3.0], np.float32)
X = np.linspace(-2.0, 1.5, 12, dtype=np.float32).reshape(3, 4)
W = np.random.default_rng(0).normal(size=(3, 4, 4)).astype(np.float32) / 2
PARAMS = {"features": W[0], "label": W[1], "domain": W[2]}
BFLOAT16 = X.astype(jnp.bfloat16)


def ordinary(x: Any, scale: Any) -> Any:
    """No reversal: what the oracles differentiate."""
    del scale
    return x


def minus(scale: Any, gradient: Any) -> np.ndarray:
    """Returns -scale * gradient, in float64, rounded once to the gradient's dtype."""
    wide = np.complex128 if np.iscomplexobj(gradient) else np.float64
    product = -np.asarray(scale, np.float64) * np.asarray(gradient, wide)
    return product.astype(gradient.dtype)


def plain(head: Callable[[Any], Any], x: Any) -> Any:
    """Returns the gradient of the sum of head at x, without reversal."""
    return jax.grad(lambda x: jnp.sum(head(x)))(x)


def expected(head: Callable[[Any], Any], x: Any, scale: Any) -> np.ndarray:
    """Returns the reversed gradient; with many scales by a loop over the examples."""
    scale = np.asarray(scale)
    if scale.size == 1:
        return minus(scale.reshape(()), plain(head, x))
    return np.stack([expected(head, *pair) for pair in zip(x, scale, strict=True)])


def total(scales: Any, x: Any = X) -> Any:
    """Returns the gradient of a sweep over scales: the sum of the single gradients."""
    return sum(expected(jnp.sin, x, scale) for scale in scales)


def gradient(head: Callable[[Any], Any], reverse: Reversal, x: Any, scale: Any) -> Any:
    """Returns the gradient of the sum of head(reverse(x, scale)) at x."""
    return jax.grad(lambda x: jnp.sum(head(reverse(x, scale))))(x)


def _constant(head, x, scale, reverse):
    return gradient(head, reverse, x, scale), expected(head, x, scale)


def _step(head, x, scale, reverse):
    """A jitted step, the scale its argument: what a schedule needs."""
    got = jax.jit(lambda x, scale: gradient(head, reverse, x, scale))(x, scale)
    return got, expected(head, x, scale)


def constant(head: Callable[[Any], Any], x: Any, scale: Any) -> Run:
    """Returns the situation of one gradient, not under jit, with a constant scale."""
    return functools.partial(_constant, head, x, scale)


def step(head: Callable[[Any], Any], x: Any, scale: Any) -> Run:
    """Returns the situation of one gradient in a jitted step with a scheduled scale."""
    return functools.partial(_step, head, x, scale)


# A network with two heads, and its gradient with the reversal written out by hand.


def features_of(w, x):
    """The feature extractor."""
    return jnp.tanh(x @ w)


def label_loss(w, h):
    """The label classifier, its loss included."""
    return jnp.sum(jnp.sin(h @ w))


def domain_loss(w, h):
    """The domain discriminator, its loss included."""
    return jnp.sum(jnp.cos(h @ w + 1))


def dann_loss(params, x, scale, reverse):
    """The loss of a DANN."""
    h = features_of(params["features"], x)
    loss = domain_loss(params["domain"], reverse(h, scale))
    return label_loss(params["label"], h) + loss


def dann_by_hand(params, x, scale):
    """Its gradient: the heads, one multiplication, then the features."""
    h, pull = jax.vjp(lambda w: features_of(w, x), params["features"])
    label, label_h = jax.grad(label_loss, (0, 1))(params["label"], h)
    domain, domain_h = jax.grad(domain_loss, (0, 1))(params["domain"], h)
    (features,) = pull(label_h + minus(scale, domain_h))
    return {"features": features, "label": label, "domain": domain}


def dann_gradient(reverse):
    """Its gradient by way of an implementation."""
    return jax.grad(functools.partial(dann_loss, reverse=reverse))


def descend(gradient_of, params, scales):
    """Descends along the gradient, once for each scale."""
    for scale in scales:
        gradients = gradient_of(params, X, scale)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)
    return params


# Every DANN.


@every_dann("gradient of a network with two heads", excerpt=True)
def _(reverse):
    return dann_gradient(reverse)(PARAMS, X, 0.3), dann_by_hand(PARAMS, X, 0.3)


@every_dann("features unchanged bit for bit, traced scale", exact=True, excerpt=True)
def _(reverse):
    x = np.random.default_rng(0).normal(size=100).astype(np.float32)
    return jax.jit(reverse)(x, S), x


@every_dann("value_and_grad in a jitted step, scheduled scale")
def _(reverse):
    loss = functools.partial(dann_loss, reverse=reverse)
    got = jax.jit(jax.value_and_grad(loss))(PARAMS, X, S)
    return got, (dann_loss(PARAMS, X, S, ordinary), dann_by_hand(PARAMS, X, S))


@every_dann("schedule: one compilation for all scales", excerpt=True)
def _(reverse):
    traces = []

    @jax.jit
    def one(x, scale):
        traces.append(scale)
        return gradient(jnp.sin, reverse, x, scale)

    got = [one(X, s) for s in (0.1, 0.2, 0.3)], {"traces": len(traces)}
    return got, ([expected(jnp.sin, X, s) for s in (0.1, 0.2, 0.3)], {"traces": 1})


@every_dann("schedule computed inside of the jitted step")
def _(reverse):
    def one(x, count):
        scale = 2 / (1 + jnp.exp(-count / 10)) - 1
        return gradient(jnp.sin, reverse, x, scale)

    return jax.jit(one)(X, 3), expected(jnp.sin, X, 2 / (1 + np.exp(-0.3)) - 1)


@every_dann("training in lax.scan, a scale for each step")
def _(reverse):
    def body(params, scale):
        return descend(dann_gradient(reverse), params, [scale]), None

    got = lax.scan(body, PARAMS, SCALES)[0]
    return got, descend(dann_by_hand, PARAMS, SCALES)


every_dann("start of the schedule: scale 0")(step(jnp.sin, X, np.float32(0)))
every_dann("scale -1: the layer switched off")(step(jnp.sin, X, np.float32(-1)))
every_dann("integer scale, 2")(constant(jnp.sin, X, 2))
every_dann("scale a jax.Array, not under jit")(
    lambda reverse: _constant(jnp.sin, X, jnp.float32(S), reverse)
)


@every_dann("the scale is a parameter: it gets no gradient")
def _(reverse):
    def loss(x, scale):
        return jnp.sum(jnp.sin(reverse(x, jnp.tanh(scale))))

    got = jax.grad(loss, (0, 1))(X, S)
    return got, (expected(jnp.sin, X, np.tanh(np.float64(S))), np.float32(0))


# Flax and optax.


class Domain(nnx.Module):
    """The features and the discriminator of PARAMS, as a module."""

    def __init__(self):
        self.features = nnx.Param(jnp.asarray(PARAMS["features"]))
        self.domain = nnx.Param(jnp.asarray(PARAMS["domain"]))

    def __call__(self, x, scale, reverse):
        """Returns the domain loss."""
        h = features_of(self.features[...], x)
        return domain_loss(self.domain[...], reverse(h, scale))


def domain_by_hand(scale):
    """The gradient of the domain loss for the features' weights."""
    h, pull = jax.vjp(lambda w: features_of(w, X), PARAMS["features"])
    return pull(minus(scale, jax.grad(domain_loss, 1)(PARAMS["domain"], h)))[0]


def _nnx(transform, reverse):
    def loss(model, x, scale):
        return jnp.sum(transform(lambda m, x, s: m(x, s, reverse))(model, x, scale))

    got = nnx.jit(lambda *args: nnx.grad(loss)(*args)["features"][...])(Domain(), X, S)
    return got, domain_by_hand(S)


NNX = {
    "NNX: nnx.grad under nnx.jit, scheduled scale": lambda f: f,
    "NNX: nnx.remat": nnx.remat,
    "NNX: nnx.vmap over examples": functools.partial(nnx.vmap, in_axes=(None, 0, None)),
    "NNX: nnx.scan over time": functools.partial(
        nnx.scan, in_axes=(None, 0, None), out_axes=0
    ),
}
for _name, _transform in NNX.items():
    flax_and_optax(_name)(functools.partial(_nnx, _transform))


@flax_and_optax("NNX: the scale is an nnx.Variable")
def _(reverse):
    scale = nnx.Variable(jnp.float32(S))
    return _constant(jnp.sin, X, S, lambda x, _: reverse(x, scale))


def _linen(transform, reverse):
    class Head(linen.Module):
        @linen.compact
        def __call__(self, h, scale):
            w = self.param("w", lambda key: jnp.zeros((4, 4)))
            return domain_loss(w, reverse(h, scale))

    def loss(w, x, scale):
        variables = {"params": {"w": PARAMS["domain"]}}
        return transform(Head)().apply(variables, features_of(w, x), scale)

    return jax.jit(jax.grad(loss))(PARAMS["features"], X, S), domain_by_hand(S)


for _name, _transform in {"apply": lambda m: m, "nn.remat": linen.remat}.items():
    flax_and_optax(f"Linen: {_name} in a jitted step, scheduled scale")(
        functools.partial(_linen, _transform)
    )


@flax_and_optax("optax: momentum, accumulated gradients, scheduled scale")
def _(reverse):
    optimizer = optax.MultiSteps(optax.sgd(0.1, 0.9), every_k_schedule=2)
    update = jax.jit(optimizer.update)

    def trained(gradient_of):
        params, state = PARAMS, optimizer.init(PARAMS)
        for scale in (*SCALES, S):
            updates, state = update(gradient_of(params, X, scale), state, params)
            params = optax.apply_updates(params, updates)
        return params

    return trained(jax.jit(dann_gradient(reverse))), trained(dann_by_hand)


# Mixed precision.


@mixed_precision("bfloat16 features keep dtype and values", exact=True)
def _(reverse):
    return jax.jit(reverse)(BFLOAT16, S), BFLOAT16


mixed_precision("gradient of bfloat16 features, scheduled float32 scale", excerpt=True)(
    step(jnp.square, BFLOAT16, S)
)


@mixed_precision("bfloat16 features that feed two heads", excerpt=True)
def _(reverse):
    def loss(h, scale):
        return jnp.sum(jnp.square(h)) + jnp.sum(jnp.square(reverse(h, scale)))

    label = plain(jnp.square, BFLOAT16)
    got = jax.grad(loss)(jnp.asarray(BFLOAT16), jnp.float32(S))
    return got, label + expected(jnp.square, BFLOAT16, S)


@mixed_precision("bfloat16: a constant scale has no systematic error", excerpt=True)
def _(reverse):
    ct = np.random.default_rng(0).uniform(1, 2, 10_000).astype(jnp.bfloat16)
    (got,) = jax.vjp(lambda x: reverse(x, 0.3), ct)[1](jnp.asarray(ct))
    # The mean over many roundings is 30 times nearer to the scale than a scale that
    # was rounded to bfloat16 itself, which is 0.26 % off.
    ratio = np.asarray(got, np.float64) / ct.astype(np.float64)
    return np.round(ratio.mean(), 3), np.float64(-0.3)


mixed_precision("gradient of float16 features, scheduled float32 scale")(
    step(jnp.square, X.astype(np.float16), S)
)
mixed_precision("float32 features, bfloat16 scale")(
    step(jnp.sin, X, S.astype(jnp.bfloat16))
)


@mixed_precision("bfloat16 encoder, float32 head")
def _(reverse):
    def head(reverse):
        return lambda x: jnp.sin(reverse(x.astype(jnp.float32), S))

    return plain(head(reverse), BFLOAT16), minus(S, plain(head(ordinary), BFLOAT16))


@mixed_precision("strict dtype promotion, bfloat16 features")
def _(reverse):
    with jax.numpy_dtype_promotion("strict"):
        return _step(jnp.square, BFLOAT16, S, reverse)


@contextlib.contextmanager
def enable_x64() -> Iterator[None]:
    """As ``jax.enable_x64(True)``, which JAX 0.7.2 has under another name."""
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", False)


@mixed_precision("x64: float32 features, float64 scale")
def _(reverse):
    with enable_x64():
        return _step(jnp.sin, X, np.float64(0.3), reverse)


@mixed_precision("x64: float64 features and scale, to double precision")
def _(reverse):
    with enable_x64():
        return _step(jnp.sin, X.astype(np.float64), np.float64(0.3), reverse)


# Per-example scale.

per_example("a scale for each example, [batch]", excerpt=True)(step(jnp.sin, X, SCALES))
per_example("gradient, scale [batch], features [batch, batch]", excerpt=True)(
    step(jnp.sin, X[:, :3], SCALES)
)
per_example("[batch] for images, NHWC")(step(jnp.sin, X.reshape(3, 2, 2, 1), SCALES))
per_example("[batch, 1]")(step(jnp.sin, X, SCALES[:, None]))
per_example("only the target domain: a bool mask as scale")(
    step(jnp.sin, X, np.array([[False], [True], [True]]))
)
per_example("[batch] of float32, bfloat16 features")(step(jnp.square, BFLOAT16, SCALES))
per_example("a scale for each element")(step(jnp.sin, X, np.abs(X)))


# Trees.

LEAVES: dict[str, Callable[[], Any]] = {
    "a second floating leaf": lambda: X,
    "a leaf of integers: labels, domains": lambda: jnp.arange(3),
    "a bool leaf: a padding mask": lambda: jnp.array([True, False, True]),
    "a leaf that is None": lambda: None,
    "a PRNG key leaf": lambda: jax.random.key(0),
    "a static leaf: a name": lambda: "encoder",
}


def _beside(make_other, reverse):
    def tree(h, scale):
        return reverse({"h": h, "other": make_other()}, scale)["h"]

    got = jax.jit(lambda x: gradient(jnp.sin, tree, x, 0.3))(X)
    return got, expected(jnp.sin, X, 0.3)


for _name, _make_other in LEAVES.items():
    trees(f"features beside {_name}", excerpt="integers" in _name)(
        functools.partial(_beside, _make_other)
    )


@trees("gradient of a whole batch, integer labels included: allow_int")
def _(reverse):
    def loss(batch):
        return jnp.sum(jnp.sin(reverse(batch, 0.3)["h"]))

    batch = {"h": X, "labels": np.arange(3)}
    got = jax.jit(lambda batch: jax.grad(loss, allow_int=True)(batch)["h"])(batch)
    return got, expected(jnp.sin, X, 0.3)


@trees("a scale for each subtree (a prefix)")
def _(reverse):
    def loss(tree):
        out = reverse(tree, {"low": 0.1, "high": 1.0})
        return jnp.sum(jnp.sin(out["low"])) + jnp.sum(jnp.cos(out["high"]))

    got = jax.grad(loss)({"low": X, "high": X})
    return got, {"low": expected(jnp.sin, X, 0.1), "high": expected(jnp.cos, X, 1.0)}


@trees("features that no head uses cost no backward work")
def _(reverse):
    def products(reverse):
        def loss(w):
            tree = reverse({"used": X @ w, "unused": jnp.sin(X) @ w}, 0.3)
            return jnp.sum(tree["used"] ** 2)

        jaxpr = jax.make_jaxpr(jax.grad(loss))(W[0])
        return {"matrix products": str(jaxpr).count("dot_general[")}

    return products(reverse), products(ordinary)


@trees("features held in an nnx.Variable")
def _(reverse):
    def variable(h, scale):
        return reverse({"h": nnx.Variable(h)}, scale)["h"][...]

    return _constant(jnp.sin, X, 0.3, variable)


# Loops and checkpoints: f(x, scale) with the layer in it, in a jitted step with a
# scheduled scale; right is the same without the layer, times -scale.


def _checkpoint(**options):
    return lambda f, x, scale: jax.checkpoint(f, **options)(x, scale)


def _over_time(wrap=lambda f: f):
    def run(f, x, scale):
        return lax.scan(wrap(lambda c, row: (c, f(row, scale))), None, x)[1]

    return run


def _fori_loop(f, x, scale):
    def body(i, y):
        return y.at[i].set(f(x[i], scale))

    return lax.fori_loop(0, 3, body, jnp.zeros_like(x))


def _switch(f, x, scale):
    branches = [jnp.exp, lambda x: f(x, scale), jnp.negative]
    return lax.switch(jnp.int32(scale > 0), branches, x)


def _own_rule(f, x, scale):
    @jax.custom_vjp
    def loss(x, scale):
        return f(x, scale)

    loss.defvjp(
        lambda x, scale: jax.vjp(lambda x: f(x, scale), x),
        lambda pull, g: (*pull(g), None),
    )
    return loss(x, scale)


LOOPS = {
    "recurrent network: lax.scan over time": _over_time(),
    "jax.checkpoint": _checkpoint(),
    "jax.checkpoint that closes over a traced scale": lambda f, x, scale: (
        jax.checkpoint(lambda x: f(x, scale))(x)
    ),
    "jax.checkpoint, dots_saveable": _checkpoint(
        policy=jax.checkpoint_policies.dots_saveable
    ),
    "jax.checkpoint, save_only_these_names": _checkpoint(
        policy=jax.checkpoint_policies.save_only_these_names("h")
    ),
    "lax.scan of jax.checkpoint": _over_time(jax.checkpoint),
    "lax.cond: reversed after a warm start": lambda f, x, scale: lax.cond(
        scale > 0, lambda x: f(x, scale), jnp.exp, x
    ),
    "lax.switch": _switch,
    "lax.fori_loop": _fori_loop,
    "lax.associative_scan after the layer": lambda f, x, scale: lax.associative_scan(
        jnp.add, f(x, scale)
    ),
    "inside of a loss with a custom_vjp of its own": _own_rule,
}


def _loop_gradient(transform, reverse):
    def loss(x, scale):
        return jnp.sum(transform(lambda x, s: jnp.sin(reverse(x, s)), x, scale))

    return jax.jit(jax.grad(loss))(X, S)


@functools.cache
def _ordinary_loop(transform):
    return minus(S, _loop_gradient(transform, ordinary))


def _loop(transform, reverse):
    return _loop_gradient(transform, reverse), _ordinary_loop(transform)


for _name, _transform in LOOPS.items():
    loops(_name)(functools.partial(_loop, _transform))


@loops("lax.scan over scales, shared x")
def _(reverse):
    def swept(x):
        return lax.scan(lambda c, s: (c, jnp.sin(reverse(x, s))), None, SCALES)[1]

    return plain(swept, X), total(SCALES)


@loops("three times in a lax.scan: -scale cubed")
def _(reverse):
    def thrice(x, scale):
        return lax.scan(lambda x, _: (reverse(x, scale), None), x, length=3)[0]

    got = gradient(jnp.sin, thrice, X, S)
    return got, expected(jnp.sin, X, np.float64(S) ** 3)


@loops("lax.while_loop, forward", exact=True)
def _(reverse):
    def run(reverse):
        x = jnp.float32(0.1)
        return lax.while_loop(lambda x: x < 9, lambda x: reverse(x, S) * 1.7, x)

    return run(reverse), run(ordinary)


# Sweeps and vmap.


@sweeps("sweep over scales: shared x, gradient outside of vmap", excerpt=True)
def _(reverse):
    swept = jax.vmap(lambda x, s: jnp.sin(reverse(x, s)), in_axes=(None, 0))
    return plain(lambda x: swept(x, SCALES), X), total(SCALES)


@sweeps("sweep over scales: shared x, gradient inside of vmap")
def _(reverse):
    got = jax.vmap(lambda s: gradient(jnp.sin, reverse, X, s))(SCALES)
    return got, np.stack([expected(jnp.sin, X, s) for s in SCALES])


@sweeps("a training for each scale, in one vmapped lax.scan")
def _(reverse):
    def run(scale):
        def body(params, share):
            return descend(dann_gradient(reverse), params, [scale * share]), None

        return lax.scan(body, PARAMS, np.array([0.5, 1.0], "f4"))[0]["features"]

    runs = [descend(dann_by_hand, PARAMS, [0.5 * s, s]) for s in SCALES]
    return jax.jit(jax.vmap(run))(SCALES), np.stack([r["features"] for r in runs])


@sweeps("vmap over examples, one scheduled scale")
def _(reverse):
    return _step(jnp.sin, X, S, jax.vmap(reverse, in_axes=(0, None)))


@sweeps("vmap over examples and their scales, gradient outside")
def _(reverse):
    return _step(jnp.sin, X, SCALES, jax.vmap(reverse))


@sweeps("vmap over the last axis, one scheduled scale")
def _(reverse):
    return _step(jnp.sin, X, S, jax.vmap(reverse, in_axes=(1, None), out_axes=1))


@sweeps("per-example gradients of the parameters: vmap of grad")
def _(reverse):
    got = jax.jit(jax.vmap(dann_gradient(reverse), (None, 0, None)))(PARAMS, X, S)
    rows = [dann_by_hand(PARAMS, x, S) for x in X]
    return got, jax.tree.map(lambda *g: np.stack(g), *rows)


@sweeps("per-example gradients, a scale for each example")
def _(reverse):
    got = jax.jit(jax.vmap(dann_gradient(reverse), (None, 0, 0)))(PARAMS, X, SCALES)
    rows = [dann_by_hand(PARAMS, x, s) for x, s in zip(X, SCALES, strict=True)]
    return got, jax.tree.map(lambda *g: np.stack(g), *rows)


@sweeps("scales by examples: vmap in vmap, gradient outside")
def _(reverse):
    rows = jax.vmap(reverse, in_axes=(0, None))
    swept = jax.vmap(lambda x, s: jnp.sin(rows(x, s)), in_axes=(None, 0))
    return plain(lambda x: swept(x, SCALES), X), total(SCALES)


@sweeps("vmap in vmap with the gradient between, shared x")
def _(reverse):
    def one(factor):
        swept = jax.vmap(lambda x, s: jnp.sin(reverse(x, s)), in_axes=(None, 0))
        return plain(lambda x: swept(x, factor * SCALES), X)

    return jax.vmap(one)(SCALES), np.stack([total(r * SCALES) for r in SCALES])


@sweeps("sweep over scales: shared bfloat16 x, gradient outside")
def _(reverse):
    swept = jax.vmap(lambda x, s: reverse(x, s), in_axes=(None, 0))
    got = plain(lambda x: swept(x, SCALES), BFLOAT16)
    return got, expected(lambda x: x, BFLOAT16, SCALES.sum())


@sweeps("sweep over per-example scales: [sweep, batch], shared x")
def _(reverse):
    scales = np.arange(1, 7, dtype=np.float32).reshape(2, 3)
    swept = jax.vmap(lambda x, s: jnp.sin(reverse(x, s)), in_axes=(None, 0))
    return plain(lambda x: swept(x, scales), X[:, :3]), total(scales, X[:, :3])


@sweeps("hessian of a sweep over scales, shared x")
def _(reverse):
    def loss(x):
        return jnp.sum(jax.vmap(lambda s: jnp.sin(reverse(x, s)))(SCALES))

    hessian = jax.hessian(lambda x: jnp.sum(jnp.sin(x)))(X[0])
    return jax.jit(jax.hessian(loss))(X[0]), minus(-np.sum(SCALES**2), hessian)


# Higher order: each differentiation passes through the rule.


def _sine(reverse):
    return lambda x: jnp.sum(jnp.sin(W[0] @ reverse(x, S)))


def _summed(f):
    return lambda x: lax.scan(lambda c, a: (c + f(a * x), None), 0.0, SCALES)[0]


SECOND_ORDER = {
    "hessian": jax.hessian,
    "Hessian-vector product: jvp of grad": lambda f: (
        lambda x: jax.jvp(jax.grad(f), (x,), (X[1],))[1]
    ),
    "Hessian-vector product: grad of grad": lambda f: jax.grad(
        lambda x: jax.grad(f)(x) @ X[1]
    ),
    "Hessian-vector product: linearize of grad": lambda f: (
        lambda x: jax.linearize(jax.grad(f), x)[1](X[1])
    ),
    "jacrev of jacrev": lambda f: jax.jacrev(jax.jacrev(f)),
    "hessian through jax.checkpoint": lambda f: jax.hessian(jax.checkpoint(f)),
    "jacrev of jacrev through a scan": lambda f: jax.jacrev(jax.jacrev(_summed(f))),
    "hessian through lax.scan": lambda f: jax.hessian(_summed(f)),
    "hessian through jax.checkpoint of lax.scan": lambda f: jax.hessian(
        jax.checkpoint(_summed(f))
    ),
    "Hessian-vector products for each example: vmap": lambda f: (
        lambda x: jax.vmap(lambda v: jax.jvp(jax.grad(f), (x,), (v,))[1])(X)
    ),
}


def _second_order(operator, reverse):
    got = jax.jit(operator(_sine(reverse)))(X[0])
    return got, minus(-(np.float64(S) ** 2), _ordinary_second_order(operator))


@functools.cache
def _ordinary_second_order(operator):
    return jax.jit(operator(_sine(ordinary)))(X[0])


# JAX before 0.12 drops custom_jvp rules there; jaxgrl raises rather than be wrong.
RAISES = "TypeError: can't apply forward-mode" if jax.__version_info__ < (0, 12) else ""

for _name, _operator in SECOND_ORDER.items():
    _limit = RAISES if _name.endswith("lax.scan") else ""
    higher_order(_name, excerpt=_name == "hessian", limit=_limit)(
        functools.partial(_second_order, _operator)
    )


@higher_order("jacrev")
def _(reverse):
    def jacobian(reverse):
        return jax.jacrev(lambda x: jnp.sin(W[0] @ reverse(x, S)))(X[0])

    return jacobian(reverse), minus(S, jacobian(ordinary))


@higher_order("gradient penalty (WGAN-GP)")
def _(reverse):
    def penalty(x, scale):
        return jnp.sum(gradient(jnp.sin, reverse, x, scale) ** 2)

    # The penalty is |g|^2 of the reversed gradient g, whose Jacobian is scale^2 f''.
    hessian = jax.hessian(lambda x: jnp.sum(jnp.sin(x)))(X[0])
    g = expected(jnp.sin, X[0], S)
    return jax.jit(jax.grad(penalty))(X[0], S), minus(-2 * S**2, hessian @ g)


@higher_order("MAML: gradient through an inner step of descent")
def _(reverse):
    def loss(x, scale):
        return jnp.sum((x - 0.1 * gradient(jnp.sin, reverse, x, scale)) ** 2)

    hessian = jax.hessian(lambda x: jnp.sum(jnp.sin(x)))(X[0])
    jacobian = np.eye(4) - 0.1 * minus(-(S**2), hessian)
    inner = X[0] - 0.1 * expected(jnp.sin, X[0], S)
    return jax.jit(jax.grad(loss))(X[0], S), (2 * jacobian @ inner).astype(np.float32)


@higher_order("third derivative")
def _(reverse):
    def third(reverse):
        return jax.grad(jax.grad(jax.grad(lambda x: jnp.sin(reverse(x, S)))))(X[0, 0])

    return third(reverse), minus(np.float64(S) ** 3, third(ordinary))


# Forward mode, for the user who wants it.


def _asked(reverse):
    """The implementation in forward mode: jaxgrl's is an option, the others have it."""
    if reverse is gradient_reversal:
        return functools.partial(reverse, forward_mode=True)
    return reverse


FORWARD = {
    "jvp": lambda f: jax.jvp(f, (X[0],), (X[1],))[1],
    "jacfwd": lambda f: jax.jacfwd(f)(X[0]),
    "linearize": lambda f: jax.linearize(f, X[0])[1](X[1]),
    "jvp, bfloat16 features": lambda f: jax.jvp(f, (BFLOAT16[0],), (BFLOAT16[1],))[1],
}


def _forward(operator, reverse):
    got = operator(lambda x: jnp.square(_asked(reverse)(x, S)))
    return got, minus(S, operator(jnp.square))


for _name, _operator in FORWARD.items():
    forward_mode(_name, excerpt=_name == "jvp")(functools.partial(_forward, _operator))


@forward_mode("jacfwd of a sweep over scales, shared x")
def _(reverse):
    swept = jax.vmap(lambda x, s: jnp.sin(_asked(reverse)(x, s)), in_axes=(None, 0))
    got = jax.jit(jax.jacfwd(lambda x: jnp.sum(swept(x, SCALES))))(X[0])
    return got, total(SCALES, X[0])


@forward_mode("jvp over the scale alone: zero, without asking")
def _(reverse):
    got = jax.jit(lambda x, s: jax.jvp(lambda s: reverse(x, s), (s,), (s,))[1])(X, S)
    return got, np.zeros_like(X)


# Several devices.

EXAMPLES = np.linspace(-1, 1, 32, dtype=np.float32).reshape(8, 4)
STRENGTHS = np.arange(1, 9, dtype=np.float32)


def _mesh(kind):
    return jax.make_mesh((8,), ("i",), axis_types=(kind,))


@devices("data parallel under jit: no collective more")
def _(reverse):
    def compiled(reverse):
        specs = (P(), P("i"), P())
        one = jax.jit(
            jax.grad(lambda w, x, s: jnp.sum(jnp.sin(reverse(x @ w, s)))),
            in_shardings=tuple(NamedSharding(_mesh(AxisType.Auto), s) for s in specs),
            keep_unused=True,
        ).lower(W[0], EXAMPLES, S)
        text = one.compile().as_text() or ""
        kinds = "all-reduce", "all-gather", "all-to-all", "collective-permute"
        counts = {kind: text.count(f" {kind}(") for kind in kinds}
        return one.compile()(W[0], EXAMPLES, S), counts

    got, counts = compiled(reverse)
    without, ordinary_counts = compiled(ordinary)
    return (got, counts), (minus(S, without), ordinary_counts)


def _shard_map(check_vma, x_spec, scale_spec, reverse):
    def local(x, s):
        return lax.psum(jnp.sum(jnp.sin(reverse(x, s.sum()))), "i")

    mapped = jax.shard_map(
        local,
        mesh=_mesh(AxisType.Auto),
        in_specs=(x_spec, scale_spec),
        out_specs=P(),
        check_vma=check_vma,
    )
    # Each device reverses its part of x by the sum of its part of the scales.
    scales = STRENGTHS if scale_spec else [STRENGTHS.sum()] * 8
    if x_spec:
        right = expected(jnp.sin, EXAMPLES, np.asarray(scales))
    else:
        right = total(scales, EXAMPLES)
    return jax.jit(jax.grad(mapped))(EXAMPLES, STRENGTHS), right


for _x_spec, _scale_spec, _check_vma in (
    (P("i"), P(), True),
    (P("i"), P("i"), True),
    (P(), P("i"), True),
    (P(), P(), True),
    (P("i"), P(), False),
    (P("i"), P("i"), False),
    (P(), P("i"), False),
    (P(), P(), False),
):
    _x, _scale = (
        "sharded" if spec else "replicated" for spec in (_x_spec, _scale_spec)
    )
    _vma = "" if _check_vma else ", check_vma off"
    devices(
        f"shard_map: x {_x}, scale {_scale}{_vma}",
        excerpt=_check_vma and bool(_scale_spec) and not _x_spec,
    )(functools.partial(_shard_map, _check_vma, _x_spec, _scale_spec))


@devices("shard_map: a sweep, one scale for each device")
def _(reverse):
    mapped = jax.shard_map(
        lambda x, s: gradient(jnp.sin, reverse, x, s[0])[None],
        mesh=_mesh(AxisType.Auto),
        in_specs=(P(), P("i")),
        out_specs=P("i"),
        check_vma=False,
    )
    got = jax.jit(mapped)(X, STRENGTHS)
    return got, np.stack([expected(jnp.sin, X, s) for s in STRENGTHS])


def _explicit(scale, spec, reverse):
    with jax.set_mesh(_mesh(AxisType.Explicit)):
        x, s = jax.device_put(EXAMPLES, P("i")), jax.device_put(scale, spec)
        return _step(jnp.sin, x, s, reverse)[0], expected(jnp.sin, EXAMPLES, scale)


devices("Explicit mesh: x sharded, one scale")(functools.partial(_explicit, S, P()))
devices("Explicit mesh: x and a scale for each example sharded alike")(
    functools.partial(_explicit, STRENGTHS, P("i"))
)


@devices("sweep over a mesh: vmap with spmd_axis_name, shared x")
def _(reverse):
    one = jax.vmap(
        lambda x, s: jnp.sin(reverse(x, s)), in_axes=(None, 0), spmd_axis_name="i"
    )
    with jax.set_mesh(_mesh(AxisType.Auto)):
        got = jax.jit(lambda x: plain(lambda x: one(x, STRENGTHS), x))(X)
    return got, total(STRENGTHS)


# Tools.


def _within(context, reverse):
    with context():
        return _step(jnp.sin, X, S, reverse)


CONTEXTS = {
    "jax.debug_nans": lambda: jax.debug_nans(True),
    "jax.checking_leaks": jax.checking_leaks,
    "jax.disable_jit": jax.disable_jit,
}
for _name, _context in CONTEXTS.items():
    tools(_name)(functools.partial(_within, _context))


@tools("numpy_rank_promotion raises, a scale for each example")
def _(reverse):
    with jax.numpy_rank_promotion("raise"):
        return _step(jnp.sin, X, SCALES, reverse)


@tools("donated features")
def _(reverse):
    def one(x, scale):
        return x - gradient(jnp.sin, reverse, x, scale)

    got = jax.jit(one, donate_argnums=0)(jnp.asarray(X), S)
    return got, X - expected(jnp.sin, X, S)


@tools("checkify, all checks")
def _(reverse):
    def one(x, scale):
        return gradient(jnp.sin, reverse, x, scale)

    error, got = jax.jit(checkify.checkify(one, errors=checkify.all_checks))(X, S)
    error.throw()
    return got, expected(jnp.sin, X, S)


@tools("jax.export with the gradient, saved and loaded")
def _(reverse):
    def loss(x, scale):
        return jnp.sum(jnp.sin(reverse(x, scale)))

    saved = jax.export.export(jax.jit(loss))(X, S).serialize(vjp_order=1)
    got = jax.grad(jax.export.deserialize(saved).call, (0, 1))(X, S)
    return got, (expected(jnp.sin, X, S), np.float32(0))


# Rare inputs.


@rare_inputs("inf, nan, -0.0 and subnormals, bit for bit", exact=True)
def _(reverse):
    x = np.array([np.inf, -np.inf, np.nan, -0.0, 1e-45, -1e-40], np.float32)
    return jax.jit(reverse)(x, S), x


@rare_inputs("a Python float as x")
def _(reverse):
    got = jax.grad(lambda x: jnp.sin(reverse(x, 0.3)))(1.0)
    return got, minus(0.3, jax.grad(jnp.sin)(1.0))


rare_inputs("integer scale, a traced int32")(step(jnp.sin, X, np.int32(2)))
rare_inputs("a traced uint8 as scale")(step(jnp.sin, X, np.uint8(2)))
rare_inputs("a Python bool as scale")(constant(jnp.sin, X, True))
rare_inputs("a scale of shape [1]")(step(jnp.sin, X, SCALES[1:2]))


@rare_inputs("an empty batch, a scale for each example")
def _(reverse):
    return gradient(jnp.sin, reverse, X[:0], SCALES[:0]), plain(jnp.sin, X[:0])


@rare_inputs("complex features")
def _(reverse):
    def magnitude(z):
        return jnp.abs(z) ** 2 + z.real

    return _step(magnitude, (X + 1j * X[::-1]).astype(np.complex64), S, reverse)


@rare_inputs("complex features, a cotangent with an infinite part")
def _(reverse):
    x = np.array([1 + 1j], "c8")
    (got,) = jax.vjp(lambda x: reverse(x, 2.0), x)[1](jnp.array([np.inf + 1j], "c8"))
    return (got.real, got.imag), (np.array([-np.inf], "f4"), np.array([-2], "f4"))


@rare_inputs("float8_e4m3fn features, float32 scale")
def _(reverse):
    x = jnp.asarray(X, jnp.float8_e4m3fn)
    (got,) = jax.vjp(lambda x: reverse(x, np.float32(0.5)), x)[1](x)
    return got, minus(0.5, x)


# Mistakes to refuse: at the call, where the traceback shows the line, and not in the
# backward pass; and never with a gradient.


def _refused(x, scale, reverse):
    try:
        reverse(x, scale)
    except (TypeError, ValueError):
        return REFUSED, REFUSED
    return jax.vjp(lambda x: reverse(x, scale), x)[1](np.ones_like(x))[0], REFUSED


MISTAKES = {
    "4 scales for a last batch of 3 examples, 4 features": (X, np.arange(1.0, 5.0)),
    "two scales for three examples": (X, SCALES[:2]),
    "[batch, 1] scales for [batch] features": (X[:, 0], SCALES[:, None]),
    "a list of scales": (X[:, :3], [1.0, 2.0, 3.0]),
    "None as scale": (X, None),
    "a string as scale": (X, "0.3"),
    "complex scale": (X, np.complex64(0.3 + 1j)),
    "float8_e8m0fnu features, which have no sign": (
        np.ones(3, jnp.float8_e8m0fnu),
        0.5,
    ),
}
for _name, (_x, _scale) in MISTAKES.items():
    mistakes(_name)(functools.partial(_refused, _x, _scale))


# Known limits of jaxgrl, which its documents name.


@known_limits("scale 0 and an infinite gradient", limit="nan, not 0")
def _(reverse):
    (got,) = jax.vjp(lambda x: reverse(x, 0.0), X[0])[1](np.full(4, np.inf, "f4"))
    return got, np.zeros_like(X[0])


# JAX before 0.10 refuses custom rules there.
JET = "0.54, not -0.162" if jax.__version_info__ >= (0, 10) else "TypeError: JetTrace"


@known_limits("jax.experimental.jet", limit=JET)
def _(reverse):
    def first(reverse):
        def f(x):
            return jnp.sin(reverse(x, S))

        return jet.jet(f, (jnp.float32(1),), ((1.0, 0.0),))[1][0]

    return first(reverse), minus(S, first(ordinary))


@known_limits("jax.linear_transpose of the layer", limit="NotImplementedError: ")
def _(reverse):
    (got,) = jax.linear_transpose(lambda x: reverse(x, S), X)(X)
    return got, minus(S, X)


@known_limits("x donated, the result still in use", limit="RuntimeError: Array has")
def _(reverse):
    x = jnp.asarray(X)
    y = reverse(x, S)
    jax.jit(lambda x: x + 1, donate_argnums=0)(x)
    return np.asarray(y), X
