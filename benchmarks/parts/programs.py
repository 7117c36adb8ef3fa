"""The programs whose overhead and time are measured: models, settings and scales.

A model is a feature extractor with two heads on it, a label classifier and a domain
discriminator. A setting is what a training wraps round its gradient. Each gradient is
written three times: with a layer, without one, and by hand, as two vjps with one
multiplication between them. The last is the physical limit.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

import jaxgrl
import jaxgrl.linen
import jaxgrl.nnx

BATCH = 64
SWEEP = 4  # scales in one program
STEPS = 4  # training steps in one program
LEAVES = 50
GRU_WIDTH = 64

Params = Any
Reverse = Callable[[Any, Any], Any]
Loss = Callable[[Params, jax.Array, Any], jax.Array]
Gradient = Callable[[Params, jax.Array, Any], Params]


class Model(NamedTuple):
    """A feature extractor, two heads, their parameters and a batch.

    ``features(params, x)`` gives an array ``[batch, ...]`` or a tree of them;
    ``label(params, h)`` and ``domain(params, h)`` give logits. ``reverse`` is the layer
    as this kind of model spells it.
    """

    features: Callable[[Params, jax.Array], Any]
    label: Callable[[Params, Any], Any]
    domain: Callable[[Params, Any], Any]
    params: Params
    x: jax.Array
    reverse: Reverse = jaxgrl.gradient_reversal


def _weights(key: jax.Array, dtype: Any, **shapes: tuple[int, ...]) -> Params:
    keys = jax.random.split(key, len(shapes))
    return {
        name: (jax.random.normal(k, shape) / 8).astype(dtype)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def _head(params: Params, h: Any) -> jax.Array:
    """Returns logits, from features pooled over all axes between the outer two."""
    leaves = jax.tree.leaves(h)
    pooled = [x.mean(tuple(range(1, x.ndim - 1))) if x.ndim > 2 else x for x in leaves]
    joined = jnp.concatenate(pooled, axis=-1) if len(pooled) > 1 else pooled[0]
    return jax.nn.relu(joined @ params["a"]) @ params["b"]


def _model(
    dtype: Any,
    features: Callable[[Params, jax.Array], Any],
    input_shape: tuple[int, ...],
    width: int,
    **shapes: tuple[int, ...],
) -> Model:
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "features": _weights(keys[0], dtype, **shapes),
        "label": _weights(keys[1], dtype, a=(width, 64), b=(64, 10)),
        "domain": _weights(keys[2], dtype, a=(width, 64), b=(64, 1)),
    }
    x = jax.random.normal(keys[3], (BATCH, *input_shape)).astype(dtype)
    return Model(features, _head, _head, params, x)


def mlp(dtype: Any, width: int = 256) -> Model:
    """Returns a model with features [batch, width]."""

    def features(params, x):
        return jnp.tanh(jax.nn.relu(x @ params["a"]) @ params["b"])

    square = (width, width)
    return _model(dtype, features, (width,), width, a=square, b=square)


def _convolve(kernel: jax.Array, x: jax.Array) -> jax.Array:
    dims = ("NHWC", "HWIO", "NHWC")
    h = lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=dims)
    return jax.nn.relu(h)


def cnn(dtype: Any) -> Model:
    """Returns a model with features [batch, 4, 4, 64]."""

    def features(params, x):
        return _convolve(params["b"], _convolve(params["a"], x))

    shapes = {"a": (3, 3, 3, 32), "b": (3, 3, 32, 64)}
    return _model(dtype, features, (16, 16, 3), 64, **shapes)


def conv_attention(dtype: Any) -> Model:
    """Returns a model with features [batch, 64, 32]: self-attention over pixels."""

    def features(params, x):
        h = _convolve(params["kernel"], x)
        h = h.reshape(len(x), -1, h.shape[-1])
        q, k, v = (h @ params[name] for name in "qkv")
        attention = jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", q, k))
        return h + jnp.einsum("bqk,bkc->bqc", attention, v)

    maps = {"q": (32, 32), "k": (32, 32), "v": (32, 32)}
    return _model(dtype, features, (16, 16, 3), 32, kernel=(3, 3, 3, 32), **maps)


def _gru_scan(params: Params, x: jax.Array, output: Callable[[Any], Any]) -> Any:
    """Returns ``output(state)`` for every time step, of x [batch, time, 32]."""

    def cell(h, x):
        r, z = (jax.nn.sigmoid(x @ params["x" + g] + h @ params[g]) for g in "rz")
        n = jnp.tanh(x @ params["xn"] + r * (h @ params["n"]))
        h = (1 - z) * n + z * h
        return h, output(h)

    start = jnp.zeros((len(x), GRU_WIDTH), x.dtype)
    return lax.scan(cell, start, jnp.swapaxes(x, 0, 1))[1]


def gru(dtype: Any) -> Model:
    """Returns a model with features [batch, 16, 64]: the states of a scan over time."""

    def features(params, x):
        return jnp.swapaxes(_gru_scan(params, x, lambda h: h), 0, 1)

    own = {gate: (GRU_WIDTH, GRU_WIDTH) for gate in "rzn"}
    own |= {f"x{gate}": (32, GRU_WIDTH) for gate in "rzn"}
    return _model(dtype, features, (16, 32), GRU_WIDTH, **own)


def tree(dtype: Any) -> Model:
    """Returns a model whose features are a tree of 50 leaves [batch, 8]."""

    def features(params, x):
        leaves = jnp.split(jnp.tanh(x @ params["a"]), LEAVES, axis=1)
        return {f"leaf {i}": leaf for i, leaf in enumerate(leaves)}

    return _model(dtype, features, (64,), 8 * LEAVES, a=(64, 8 * LEAVES))


def nnx_mlp(dtype: Any) -> Model:
    """Returns a model of Flax NNX modules, with features [batch, 128]."""

    def block(*widths):
        layers = [
            nnx.Linear(a, b, rngs=nnx.Rngs(a), dtype=dtype, param_dtype=dtype)
            for a, b in itertools.pairwise(widths)
        ]
        return nnx.Sequential(layers[0], nnx.relu, *layers[1:])

    parts = {"features": block(64, 128, 128), "label": block(128, 64, 10)}
    parts["domain"] = block(128, 64, 1)
    split = {name: nnx.split(part) for name, part in parts.items()}

    def call(name):
        return lambda params, x: nnx.merge(split[name][0], params)(x)

    x = jax.random.normal(jax.random.key(0), (BATCH, 64)).astype(dtype)
    params = {name: state for name, (_, state) in split.items()}
    layer = jaxgrl.nnx.GradientReversal()
    return Model(call("features"), call("label"), call("domain"), params, x, layer)


def linen_mlp(dtype: Any) -> Model:
    """Returns a model of Flax Linen modules, with features [batch, 128]."""

    def block(*widths):
        layers = [flax.linen.Dense(w, dtype=dtype, param_dtype=dtype) for w in widths]
        return flax.linen.Sequential([layers[0], flax.linen.relu, *layers[1:]])

    parts = {"features": block(128, 128), "label": block(64, 10)}
    parts["domain"] = block(64, 1)
    x = jax.random.normal(jax.random.key(0), (BATCH, 64)).astype(dtype)
    h = jnp.zeros((BATCH, 128), dtype)
    params = {
        name: part.init(jax.random.key(i), x if name == "features" else h)
        for i, (name, part) in enumerate(parts.items())
    }

    def reverse(h, scale):
        return jaxgrl.linen.GradientReversal().apply({}, h, scale)

    features, label, domain = (part.apply for part in parts.values())
    return Model(features, label, domain, params, x, reverse)


# The three ways to write a gradient.
def _label_loss(model: Model, params: Params, h: Any) -> jax.Array:
    labels = jnp.arange(BATCH) % 10
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    return cross_entropy(model.label(params, h).astype(jnp.float32), labels).mean()


def _domain_loss(model: Model, params: Params, h: Any) -> jax.Array:
    domains = jnp.arange(BATCH) >= BATCH // 2
    return jaxgrl.domain_loss(model.domain(params, h), domains)


def identity(h: Any, scale: Any) -> Any:
    """Returns h: no layer at all."""
    del scale
    return h


def make_loss(model: Model, reverse: Reverse, around: Any) -> Loss:
    """Returns the loss of a DANN; ``around`` goes round the parts of the network."""

    def loss(params, x, scale):
        h = around(model.features)(params["features"], x)
        domain_loss = around(
            lambda params, h, scale: _domain_loss(model, params, reverse(h, scale))
        )
        label_loss = _label_loss(model, params["label"], h)
        return label_loss + domain_loss(params["domain"], h, scale)

    return loss


def make_loss_in_scan(model: Model, reverse: Reverse, around: Any) -> Loss:
    """Returns the loss of a GRU whose layer and heads are inside the scan over time."""
    del around

    def loss(params, x, scale):
        def output(h):
            domain_loss = _domain_loss(model, params["domain"], reverse(h, scale))
            return _label_loss(model, params["label"], h) + domain_loss

        return _gru_scan(params["features"], x, output).mean()

    return loss


def _reversed_by_hand(ct: jax.Array, scale: jax.Array) -> jax.Array:
    column = scale.reshape(scale.shape + (1,) * (ct.ndim - scale.ndim))
    return (-column * ct.astype(jnp.float32)).astype(ct.dtype)


def pull_by_hand(
    model: Model, around: Any, params: Params, x: jax.Array, scale: Any
) -> tuple[jax.Array, Any]:
    """Returns the loss, and a function from its cotangent to the reversed gradient."""
    features = around(model.features)
    h, pull = jax.vjp(lambda p: features(p, x), params["features"])
    label, pull_label = jax.vjp(
        lambda p, h: _label_loss(model, p, h), params["label"], h
    )
    domain_loss = around(lambda p, h: _domain_loss(model, p, h))
    domain, pull_domain = jax.vjp(domain_loss, params["domain"], h)
    scale = jnp.asarray(scale, jnp.float32)

    def pull_all(pulls, scale, ct):
        pull, pull_label, pull_domain = pulls
        label, label_ct = pull_label(ct)
        domain, domain_ct = pull_domain(ct)
        domain_ct = jax.tree.map(lambda ct: _reversed_by_hand(ct, scale), domain_ct)
        (features,) = pull(jax.tree.map(jnp.add, label_ct, domain_ct))
        return ({"features": features, "label": label, "domain": domain},)

    pulls = (pull, pull_label, pull_domain)
    return label + domain, jax.tree_util.Partial(pull_all, pulls, scale)


@jax.custom_vjp
def one_rule(x: Any, scale: Any) -> Any:
    """The reversal by hand as a rule, right to first order and for these scales only.

    It goes where two vjps cannot be parted: into a checkpoint or the body of a scan.
    """
    del scale
    return x


def _one_rule_bwd(scale: Any, ct: Any) -> Any:
    scale = jnp.asarray(scale, jnp.float32)
    return jax.tree.map(lambda leaf: _reversed_by_hand(leaf, scale), ct), None


one_rule.defvjp(lambda x, scale: (x, scale), _one_rule_bwd)


# What a training wraps round a gradient: from gradient(params, x, scale) to
# program(state, x, argument), where make_scale(argument) is the scale.
Scale = Callable[[Any], Any]


def plain(gradient: Gradient, make_scale: Scale) -> Callable[..., Any]:
    """Returns the gradient itself."""
    return lambda params, x, argument: gradient(params, x, make_scale(argument))


def sgd_steps(gradient: Gradient, make_scale: Scale) -> Callable[..., Any]:
    """Returns several SGD steps in one scan."""

    def program(params, x, argument):
        def step(params, _):
            grads = gradient(params, x, make_scale(argument))
            return jax.tree.map(lambda p, g: p - p.dtype.type(0.1) * g, params, grads)

        return lax.scan(lambda p, i: (step(p, i), None), params, length=STEPS)[0]

    return program


def sweep(gradient: Gradient, make_scale: Scale) -> Callable[..., Any]:
    """Returns the gradients of several runs, each with its own scale, by one vmap."""
    return jax.vmap(plain(gradient, make_scale), in_axes=(0, None, 0))


def adam_step(gradient: Gradient, make_scale: Scale) -> Callable[..., Any]:
    """Returns one step of Adam."""
    optimizer = optax.adam(1e-3)

    def program(state, x, argument):
        params, opt_state = state
        grads = gradient(params, x, make_scale(argument))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    return program


def unchanged(function: Any) -> Any:
    """Returns the function itself, round which nothing goes."""
    return function


class Program(NamedTuple):
    """A model in a setting."""

    build: Callable[[Any], Model]
    setting: Callable[[Gradient, Scale], Callable[..., Any]] = plain
    around: Callable[[Any], Any] = unchanged
    make_loss: Callable[[Model, Reverse, Any], Loss] = make_loss

    def value_and_pull(self, model: Model, reverse: Reverse | None) -> Any:
        """Returns f(params, x, scale) -> loss, vjp; by two vjps if reverse is None."""
        if reverse is None and self.make_loss is make_loss:
            return functools.partial(pull_by_hand, model, self.around)
        loss = self.make_loss(model, reverse or one_rule, self.around)
        return lambda params, x, scale: jax.vjp(lambda p: loss(p, x, scale), params)

    def gradient(self, model: Model, reverse: Reverse | None) -> Gradient:
        """Returns the gradient with a layer; by two vjps if reverse is None."""
        value_and_pull = self.value_and_pull(model, reverse)

        def gradient(params, x, scale):
            loss, pull = value_and_pull(params, x, scale)
            (grads,) = pull(jnp.ones_like(loss))
            return grads

        return gradient


PROGRAMS = {
    "MLP": Program(mlp),
    "CNN": Program(cnn),
    "conv + attention": Program(conv_attention),
    "GRU, scan over time": Program(gru),
    "GRU, layer in the scan": Program(gru, make_loss=make_loss_in_scan),
    "tree of 50 leaves": Program(tree),
    "MLP under checkpoint": Program(mlp, around=jax.checkpoint),
    "MLP, SGD steps in a scan": Program(mlp, sgd_steps),
    "MLP, vmap over scales": Program(mlp, sweep),
    "NNX, Adam step, donated": Program(nnx_mlp, adam_step),
    "Linen, Adam step, donated": Program(linen_mlp, adam_step),
}

# How a scale reaches the layer: the argument of the program, and the scale made of it.
SCALES: dict[str, tuple[Any, Scale]] = {
    "Python number": (None, lambda argument: 0.3),
    "traced": (np.float32(0.3), lambda argument: argument),
    "scheduled": (np.int32(100), jaxgrl.dann_schedule(transition_steps=1000)),
    "per example": (np.linspace(0.1, 1, BATCH, dtype=np.float32), lambda s: s),
}


def make_arguments(program: Program, model: Model, scale: str) -> tuple[Any, ...]:
    """Returns (state, x, argument), what the program is called with."""
    state, argument = model.params, SCALES[scale][0]
    if program.setting is adam_step:
        state = (state, optax.adam(1e-3).init(state))
    if program.setting is sweep:
        state = jax.tree.map(lambda p: jnp.stack([p] * SWEEP), state)
        argument = np.stack(
            [argument * argument.dtype.type(k + 1) for k in range(SWEEP)]
        )
    return state, model.x, argument
