"""No correct model has a problem, and the strength of its reversal is 1."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from report_models import (
    BATCH,
    DOMAINS,
    X,
    classify,
    dann,
    dense,
    discriminate,
    encode,
    hide,
    label_loss,
    make_params,
    of_a_tree,
    total,
)

import jaxgrl.linen
import jaxgrl.nnx
from jaxgrl import (
    domain_loss,
    entropy_weights,
    gradient_reversal,
    multilinear_map,
    reversal_report,
)

pytestmark = pytest.mark.slow

# name -> a function without arguments that returns (loss, params, *args).
MODELS = {}


def model(function):
    """Registers a function that returns a correct model."""
    MODELS[function.__name__] = function
    return function


def of_parts(**parts):
    return lambda: (dann(**parts), make_params())


MODELS["dann"] = of_parts()

# ---- the layer, written otherwise


@jax.custom_vjp
def by_custom_vjp(x, scale):
    return x


by_custom_vjp.defvjp(lambda x, s: (x, s), lambda s, g: (-s * g, None))


@jax.custom_jvp
def by_custom_jvp(x, scale):
    return x


by_custom_jvp.defjvp(lambda p, t: (p[0], -p[1] * t[0]))


def by_custom_gradient(x, scale):
    return jax.custom_gradient(lambda x: (x, lambda g: -scale * g))(x)


LAYERS = {
    "five_lines_custom_vjp": by_custom_vjp,
    "five_lines_custom_jvp": by_custom_jvp,
    # Optax asks `if scale == 1`, so this loss is traced for each scale.
    "optax_scale_gradient": lambda x, s: optax.scale_gradient(x, -s),
    "forward_mode": lambda x, s: gradient_reversal(x, s, forward_mode=True),
    "jit": jax.jit(gradient_reversal),
    "remat": jax.checkpoint(gradient_reversal),
    "remat_of_jit": jax.checkpoint(jax.jit(gradient_reversal)),
    "vmap": jax.vmap(gradient_reversal, in_axes=(0, None)),
    "map": lambda x, s: jax.lax.map(lambda row: gradient_reversal(row, s), x),
    "cond": lambda x, s: jax.lax.cond(
        s > -1, lambda: gradient_reversal(x, s), lambda: x
    ),
    "fori_loop": lambda x, s: jax.lax.fori_loop(
        0, 1, lambda i, x: gradient_reversal(x, s), x
    ),
    "per_example": lambda x, s: gradient_reversal(x, s * jnp.ones(len(x), x.dtype)),
    "vmapped_scale": lambda x, s: jax.vmap(gradient_reversal)(x, s * jnp.ones(len(x))),
    "halves": lambda x, s: jnp.concatenate(
        gradient_reversal([x[:, :4], x[:, 4:]], [s, s]), axis=1
    ),
    "two_lines": lambda x, s: jnp.concatenate(
        [
            gradient_reversal(x[:, :4], s),
            gradient_reversal(x[:, 4:], s),
        ],
        axis=1,
    ),
    "five_lines_tree": lambda x, s: of_a_tree({"a": x, "b": x}, s)["b"],
    "linen_layer": lambda x, s: jaxgrl.linen.GradientReversal().apply({}, x, s),
    "nnx_layer": lambda x, s: jaxgrl.nnx.GradientReversal()(x, s),
    "clip": lambda x, s: gradient_reversal(x, jnp.clip(s, 0.0, 1.0)),
    "schedule": lambda x, s: gradient_reversal(x, 2 / (1 + jnp.exp(-15 * s)) - 1),
    "square_root": lambda x, s: gradient_reversal(x, jnp.sqrt(s)),
    "square": lambda x, s: gradient_reversal(x, s**2),
    "where": lambda x, s: gradient_reversal(x, jnp.where(s > 0, s, 0.0)),
    "barrier": lambda x, s: gradient_reversal(jax.lax.optimization_barrier(x), s),
}
for _name, _layer in LAYERS.items():
    MODELS[f"layer_{_name}"] = of_parts(layer=_layer)


@model
def layer_custom_gradient():
    # The rule closes over the scale, so this loss is traced for each scale.
    return dann(layer=by_custom_gradient), make_params()


# ---- identities with a rule that do not reverse


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1e-3, 1e-3),))


@jax.custom_vjp
def normalized(x):
    return x


normalized.defvjp(lambda x: (x, None), lambda _, g: (g / (jnp.linalg.norm(g) + 1e-9),))

MODELS |= {
    "clipping_in_front_of_the_label_head": of_parts(
        classify=lambda p, f, s: classify(p, clipped(f), s)
    ),
    "normalizing_in_front_of_the_label_head": of_parts(
        classify=lambda p, f, s: classify(p, normalized(f), s)
    ),
    "clipping_in_the_discriminator": of_parts(
        discriminate=lambda p, h, s: discriminate(p, clipped(h), s)
    ),
    "clipping_in_front_of_both_heads": of_parts(
        encode=lambda p, s: clipped(encode(p, s))
    ),
    "scaled_gradient_of_the_encoder": of_parts(
        encode=lambda p, s: optax.scale_gradient(encode(p, s), 0.1)
    ),
    "checkpoint_names": of_parts(
        encode=lambda p, s: checkpoint_name(encode(p, s), "features")
    ),
}

# ---- domain losses


def bce(logits, scale=None):
    targets = DOMAINS[:, None].astype(logits.dtype)
    return optax.sigmoid_binary_cross_entropy(logits, targets)


def of_many_domains(logits, scale=None):
    domains = jnp.arange(len(X)) % logits.shape[1]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, domains)
    return jnp.mean(losses)


def focal(exponent):
    def loss(logits, scale):
        each = bce(logits)
        return jnp.mean(jax.lax.stop_gradient(1 - jnp.exp(-each)) ** exponent * each)

    return loss


def detached_entropy(logits, scale):
    p = jax.nn.sigmoid(logits)
    entropy = -(p * jnp.log(p) + (1 - p) * jnp.log(1 - p))
    return jnp.mean(jax.lax.stop_gradient(1 + jnp.exp(-entropy)) * bce(logits))


def smoothed(logits, scale):
    targets = 0.9 * DOMAINS[:, None].astype(jnp.float32) + 0.05
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits, targets))


MODELS |= {
    "focal_2": of_parts(domain_loss=focal(2)),
    "focal_4": of_parts(domain_loss=focal(4)),
    "focal_8": of_parts(domain_loss=focal(8)),
    "detached_entropy_weights": of_parts(domain_loss=detached_entropy),
    "label_smoothing": of_parts(domain_loss=smoothed),
    "weighted_domain_loss": of_parts(
        domain_loss=lambda z, s: 0.3 * domain_loss(z, DOMAINS)
    ),
    "flat_logits": of_parts(
        discriminate=lambda p, h, s: discriminate(p, h, s)[:, 0],
        domain_loss=lambda z, s: domain_loss(z, DOMAINS),
    ),
    "logits_between_0_and_1": of_parts(
        discriminate=lambda p, h, s: 0.5 + 0.1 * discriminate(p, h, s)
    ),
    "losses_in_bfloat16": of_parts(
        domain_loss=lambda z, s: domain_loss(z, DOMAINS).astype(jnp.bfloat16),
        label_loss=lambda z, s: label_loss(z).astype(jnp.bfloat16),
    ),
    "large_label_loss": of_parts(label_loss=lambda z, s: 1e3 * label_loss(z)),
    "small_domain_loss": of_parts(
        domain_loss=lambda z, s: 1e-4 * domain_loss(z, DOMAINS)
    ),
    "squared_error": of_parts(
        domain_loss=lambda z, s: jnp.mean((z - DOMAINS[:, None].astype(z.dtype)) ** 2)
    ),
}


@model
def wasserstein_with_gradient_penalty():
    def loss(params, scale):
        features = encode(params, scale)
        seen = gradient_reversal(features, scale)
        critic = lambda f: discriminate(params, hide(params, f, scale), scale)  # noqa: E731
        between = 0.3 * seen[:BATCH] + 0.7 * seen[BATCH:]
        slope = jax.vmap(jax.grad(lambda f: critic(f[None])[0, 0]))(between)
        penalty = jnp.mean((jnp.linalg.norm(slope, axis=1) - 1) ** 2)
        logits = critic(seen)
        distance = jnp.mean(logits[BATCH:]) - jnp.mean(logits[:BATCH])
        label = label_loss(classify(params, features, scale))
        return label, -jnp.abs(distance) + 0.1 * penalty, logits

    return loss, make_params()


@model
def gradient_penalty_beside_the_layer():
    def loss(params, scale):
        features = encode(params, scale)
        critic = lambda f: discriminate(params, hide(params, f, scale), scale)  # noqa: E731
        slope = jax.grad(lambda f: jnp.sum(critic(f)))(features)
        logits = critic(gradient_reversal(features, scale))
        domain = domain_loss(logits, DOMAINS) + 0.1 * jnp.mean(slope**2)
        return label_loss(classify(params, features, scale)), domain, logits

    return loss, make_params()


@model
def gaussian_likelihood_of_a_continuous_domain():
    angle = X[:, 0]

    def likelihood(outputs, scale):
        mean, log_std = outputs[:, 0], outputs[:, 1] - 3
        return jnp.mean(0.5 * ((angle - mean) / 20) ** 2 + log_std)

    return dann(domain_loss=likelihood), make_params(outputs=2)


@model
def k_domains():
    return dann(domain_loss=of_many_domains), make_params(outputs=3)


@pytest.mark.parametrize("where", ["label", "domain"])
def test_a_weight_penalty_in(where):
    def loss(params, scale):
        label, domain, logits = dann()(params, scale)
        penalty = 0.01 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
        if where == "label":
            return label + penalty, domain, logits
        return label, domain + penalty, logits

    report = reversal_report(loss, make_params())
    assert report.problems == () and report.notes == ()
    np.testing.assert_allclose(report.strength, 1, rtol=1e-5)


# ---- discriminators and features


@model
def linear_discriminator_that_starts_at_zero():
    params = make_params()
    params["out"] = jax.tree.map(jnp.zeros_like, params["out"])
    return dann(hide=lambda p, f, s: f), params


@model
def last_layer_that_starts_at_zero():
    params = make_params()
    params["out"] = jax.tree.map(jnp.zeros_like, params["out"])
    return dann(), params


@model
def two_outputs_with_biases_at_zero():
    params = make_params(outputs=2)
    params = {k: v | {"bias": jnp.zeros_like(v["bias"])} for k, v in params.items()}
    params["out"]["kernel"] *= 0
    return dann(), params


@model
def label_head_that_starts_at_zero():
    params = make_params()
    params["classifier"] = jax.tree.map(jnp.zeros_like, params["classifier"])
    return dann(), params


@model
def residual_block_that_starts_at_zero():
    params = make_params() | {
        "up": jnp.ones((8, 8), jnp.float32) / 8,
        "down": jnp.zeros((8, 8), jnp.float32),
    }

    def deeper(p, s):
        features = encode(p, s)
        return features + jax.nn.relu(features @ p["up"]) @ p["down"]

    return dann(encode=deeper), params


@model
def identical_features():
    constant = jnp.ones_like(X)
    return (
        dann(encode=lambda p, s: jnp.tanh(dense(p["features"], constant))),
        make_params(),
    )


@model
def straight_through_rounding_behind_the_layer():
    def rounded(f):
        return f + jax.lax.stop_gradient(jnp.round(4 * f) / 4 - f)

    return dann(hide=lambda p, f, s: hide(p, rounded(f), s)), make_params()


@model
def discriminator_that_is_right_everywhere():
    loss = dann(encode=lambda p, s: encode(p, s).at[BATCH:].add(3.0))

    def step(_, params):
        grads = jax.grad(lambda p: sum(loss(p, 0.0)[:2]))(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)

    return loss, jax.lax.fori_loop(0, 300, step, make_params())


@model
def low_precision_parameters():
    def low(p, s):
        return jax.nn.tanh(dense(p["features"], X.astype(jnp.bfloat16)))

    return dann(encode=low), make_params(jnp.bfloat16)


@model
def mixed_precision():
    inner = dann(
        encode=lambda p, s: jnp.tanh(dense(p["features"], X.astype("bfloat16")))
    )

    def loss(params, scale):
        low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return tuple(t.astype(jnp.float32) for t in inner(low, scale))

    return loss, make_params()


@model
def complex_parameters():
    def loss(params, scale):
        z = gradient_reversal(params["features"] * X[:, 0].astype(jnp.complex64), scale)
        logits = params["out"] * (z.real + 2 * z.imag)
        label = jnp.mean(jnp.abs(params["features"] - 1) ** 2)
        return label, domain_loss(logits, DOMAINS), logits

    params = {
        "features": jnp.array(0.5 + 0.3j, jnp.complex64),
        "out": jnp.array(1.0, jnp.float32),
    }
    return loss, params


# ---- architectures


@model
def regression_head():
    target = X[:BATCH, :3]
    return dann(label_loss=lambda z, s: jnp.mean((z - target) ** 2)), make_params()


@model
def tied_weights():
    # The label head decodes with the transposed kernel of the encoder.
    def decode(p, f, s):
        return (f @ p["features"]["kernel"].T)[:BATCH, :3]

    return dann(classify=decode), make_params()


@model
def frozen_weights_with_lora():
    params = make_params() | {
        "a": 0.1 * jnp.ones((5, 2), jnp.float32),
        "b": jnp.zeros((2, 8), jnp.float32),
    }

    def adapted(p, s):
        base = jax.lax.stop_gradient(p["features"])
        return jax.nn.tanh(dense(base, X) + X @ p["a"] @ p["b"])

    return dann(encode=adapted), params


@model
def embedding_and_a_scan_over_layers():
    params = make_params() | {
        "embedding": jax.random.normal(jax.random.key(2), (7, 8), jnp.float32),
        "blocks": jax.random.normal(jax.random.key(3), (3, 8, 8), jnp.float32) / 3,
    }
    tokens = jnp.arange(len(X)) % 7

    def deep(p, s):
        start = p["embedding"][tokens] + encode(p, s)
        block = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
        return jax.lax.scan(block, start, p["blocks"])[0]

    return dann(encode=deep), params


@model
def a_domain_loss_in_every_step_of_a_scan():
    def loss(params, scale):
        def step(state, _):
            state = jnp.tanh(state + encode(params, scale))
            seen = gradient_reversal(state, scale)
            logits = discriminate(params, hide(params, seen, scale), scale)
            return state, (domain_loss(logits, DOMAINS), logits)

        start = jnp.zeros((2 * BATCH, 8), jnp.float32)
        state, (losses, logits) = jax.lax.scan(step, start, length=3)
        label = label_loss(classify(params, state, scale))
        return label, jnp.mean(losses), jnp.moveaxis(logits, 0, 1)

    return loss, make_params()


@model
def per_example_losses_by_vmap():
    def loss(params, scale):
        def each(x, domain):
            features = jnp.tanh(x @ params["features"]["kernel"])
            seen = gradient_reversal(features, scale)[None]
            logits = discriminate(params, hide(params, seen, scale), scale)[0]
            sign = 1 - 2 * domain.astype(jnp.float32)
            return features, jax.nn.softplus(sign * logits[0]), logits

        features, losses, logits = jax.vmap(each)(X, DOMAINS)
        label = label_loss(classify(params, features, scale))
        return label, jnp.mean(losses), logits

    params = make_params()
    del params["features"]["bias"]
    return loss, params


@model
def a_whole_loss_under_jit_and_remat():
    return jax.jit(jax.checkpoint(dann())), make_params()


@model
def one_jit_for_the_inputs_of_both_heads():
    split = jax.jit(lambda f, s: (gradient_reversal(f, s), jnp.tanh(f)))

    def loss(p, scale):
        seen, features = split(encode(p, scale), scale)
        logits = discriminate(p, hide(p, seen, scale), scale)
        label = label_loss(classify(p, features, scale))
        return label, domain_loss(logits, DOMAINS), logits

    return loss, make_params()


@model
def two_heads_with_loss_weights():
    params = make_params() | {"second": make_params()["hidden"]}

    def loss(p, scale):
        features = encode(p, scale)
        logits = discriminate(
            p, hide(p, gradient_reversal(features, scale), scale), scale
        )
        other = dense(p["second"], gradient_reversal(features, scale))
        label = label_loss(classify(p, features, scale))
        second = of_many_domains(other)
        return label, 0.1 * domain_loss(logits, DOMAINS) + 0.3 * second, logits

    return loss, params


@model
def layers_of_different_depths():
    params = make_params() | {"deep": jnp.eye(8, dtype=jnp.float32)}

    def loss(p, scale):
        shallow = encode(p, scale)
        deep = jnp.tanh(shallow @ p["deep"])
        first = dense(p["hidden"], gradient_reversal(shallow, scale))
        logits = dense(p["out"], gradient_reversal(deep, scale))
        label = label_loss(classify(p, deep, scale))
        second = of_many_domains(first)
        return label, domain_loss(logits, DOMAINS) + second, logits

    return loss, params


@model
def cdan_with_entropy():
    params = make_params(width=24)

    def loss(p, scale):
        features = encode(p, scale)
        label_logits = dense(p["classifier"], features)
        joint = multilinear_map(features, jax.nn.softmax(label_logits))
        hidden = hide(p, gradient_reversal(joint, scale), scale)
        logits = discriminate(p, hidden, scale)
        weights = entropy_weights(label_logits, DOMAINS)
        domain = domain_loss(logits, DOMAINS, weights=weights)
        return label_loss(label_logits[:BATCH]), domain, logits

    return loss, params


@model
def a_batch_in_arguments_and_a_flag():
    def loss(params, scale, batch, training, name):
        assert training is True and name == "dann"
        features = jnp.tanh(dense(params["features"], batch["x"]))
        hidden = hide(params, gradient_reversal(features, scale), scale)
        logits = discriminate(params, hidden, scale)
        label = label_loss(classify(params, features, scale))
        return label, domain_loss(logits, batch["domains"]), logits

    return loss, make_params(), {"x": X, "domains": np.asarray(DOMAINS)}, True, "dann"


def nnx_parts(rngs, width=8):
    return (
        nnx.Sequential(
            nnx.Linear(5, 8, rngs=rngs),
            nnx.BatchNorm(8, rngs=rngs),
            nnx.Dropout(0.1, rngs=rngs),
            jnp.tanh,
        ),
        nnx.Linear(8, 3, rngs=rngs),
        nnx.Sequential(
            nnx.Linear(width, 8, rngs=rngs),
            nnx.relu,
            nnx.Dropout(0.1, rngs=rngs),
            nnx.Linear(8, 1, rngs=rngs),
        ),
    )


class Adversarial(nnx.Module):
    def __init__(self, rngs):
        self.encoder, self.classifier, self.discriminator = nnx_parts(rngs)
        self.reversal = jaxgrl.nnx.GradientReversal()

    def __call__(self, x, scale):
        features = self.encoder(x)
        return self.classifier(features), self.discriminator(
            self.reversal(features, scale)
        )


def flax_loss(apply):
    def loss(params, scale):
        label_logits, logits = apply(params, scale)
        return label_loss(label_logits[:BATCH]), domain_loss(logits, DOMAINS), logits

    return loss


@model
def nnx_with_batch_norm_and_dropout():
    return flax_loss(lambda model, s: model(X, s)), Adversarial(nnx.Rngs(0))


@model
def nnx_dann():
    model = jaxgrl.nnx.DANN(*nnx_parts(nnx.Rngs(0)))
    return flax_loss(lambda model, s: model(X, s)), model


@model
def nnx_cdan():
    parts = nnx_parts(nnx.Rngs(0), width=24)
    model = jaxgrl.nnx.DANN(*parts, condition=multilinear_map)
    return flax_loss(lambda model, s: model(X, s)), model


class Tied(nnx.Module):
    """A module whose label head and encoder hold one and the same parameter."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs(), (5, 8), jnp.float32))
        self.decoder_kernel = self.kernel
        self.discriminator = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x, scale):
        features = jnp.tanh(x @ self.kernel[...])
        decoded = features @ self.decoder_kernel[...].T
        return decoded[:, :3], self.discriminator(gradient_reversal(features, scale))


@model
def nnx_with_tied_weights():
    return flax_loss(lambda model, s: model(X, s)), Tied(nnx.Rngs(0))


@model
def linen_dann():
    model = jaxgrl.linen.DANN(
        nn.Sequential([nn.Dense(8), nn.tanh]),
        nn.Dense(3),
        nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(1)]),
    )
    return flax_loss(lambda p, s: model.apply(p, X, s)), model.init(
        jax.random.key(0), X
    )


class LinenNormalized(nn.Module):
    @nn.compact
    def __call__(self, x, scale):
        features = nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))
        features = nn.Dropout(0.1, deterministic=False)(jnp.tanh(features))
        hidden = nn.relu(nn.Dense(8)(gradient_reversal(features, scale)))
        return nn.Dense(3)(features), nn.Dense(1)(hidden)


@model
def linen_with_batch_norm_and_dropout():
    model, rngs = LinenNormalized(), {"dropout": jax.random.key(1)}
    variables = model.init(rngs | {"params": jax.random.key(0)}, X, 1.0)

    def loss(variables, scale, rngs):
        (label_logits, logits), _ = model.apply(
            variables, X, scale, rngs=rngs, mutable=["batch_stats"]
        )
        return label_loss(label_logits[:BATCH]), domain_loss(logits, DOMAINS), logits

    return loss, variables, rngs


@model
def equinox():
    eqx = pytest.importorskip("equinox")

    class Network(eqx.Module):
        encoder: eqx.nn.MLP
        classifier: eqx.nn.Linear
        discriminator: eqx.nn.MLP
        dropout: eqx.nn.Dropout
        name: str = eqx.field(static=True)

    keys = jax.random.split(jax.random.key(0), 3)
    network = Network(
        eqx.nn.MLP(5, 8, 8, 1, jnp.tanh, dtype=jnp.float32, key=keys[0]),
        eqx.nn.Linear(8, 3, dtype=jnp.float32, key=keys[1]),
        eqx.nn.MLP(8, 1, 8, 1, dtype=jnp.float32, key=keys[2]),
        eqx.nn.Dropout(0.1),
        "network",
    )

    def loss(network, scale, key):
        features = network.dropout(jax.vmap(network.encoder)(X), key=key)
        label_logits = jax.vmap(network.classifier)(features)
        seen = gradient_reversal(features, scale)
        logits = jax.vmap(network.discriminator)(seen)
        return label_loss(label_logits[:BATCH]), domain_loss(logits, DOMAINS), logits

    return loss, network, jax.random.key(1)


@model
def haiku():
    hk = pytest.importorskip("haiku")

    def forward(x, scale):
        features = jnp.tanh(hk.Linear(8)(x))
        hidden = jax.nn.relu(hk.Linear(8)(gradient_reversal(features, scale)))
        return hk.Linear(3)(features), hk.Linear(1)(hidden)

    network = hk.without_apply_rng(hk.transform(forward))
    params = network.init(jax.random.key(0), X, 1.0)
    return flax_loss(lambda p, s: network.apply(p, X, s)), params


def of_mesh(axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    return mesh, NamedSharding(mesh, PartitionSpec("data"))


def sharded(axis_type, layer=gradient_reversal):
    def loss(params, scale, x, domains):
        features = jnp.tanh(x @ params["features"])
        seen = layer(features, scale)
        logits = jnp.tanh(seen @ params["hidden"]) @ params["out"]
        sign = 1 - 2 * domains[:, None].astype(jnp.float32)
        domain = jnp.mean(jax.nn.softplus(sign * logits))
        return jnp.mean((features[:, 0] - x[:, 0]) ** 2), domain, logits

    mesh, rows = of_mesh(axis_type)
    params = {k: v["kernel"] for k, v in make_params().items() if k != "classifier"}
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    return loss, params, jax.device_put(X, rows), jax.device_put(DOMAINS, rows)


@model
def a_sharded_batch():
    return sharded(AxisType.Auto)


@model
def a_batch_sharded_explicitly():
    return sharded(AxisType.Explicit)


def test_parameters_that_are_sharded_explicitly():
    loss, params, *args = sharded(AxisType.Explicit)
    mesh = of_mesh(AxisType.Explicit)[0]
    columns = NamedSharding(mesh, PartitionSpec(None, "data"))
    params["features"] = jax.device_put(params["features"], columns)

    def gathered(params, *args):
        replicated = PartitionSpec(None, None)
        features = jax.sharding.reshard(params["features"], replicated)
        return loss(params | {"features": features}, *args)

    with jax.set_mesh(mesh):
        report = reversal_report(gathered, params, *args)
    assert report.problems == ()
    np.testing.assert_allclose(report.strength, 1, rtol=1e-5)


INSIDE = {
    "itself": gradient_reversal,
    "a jit": jax.jit(gradient_reversal),
    "a checkpoint": lambda x, scale: jax.checkpoint(
        lambda x: jnp.sin(gradient_reversal(x, scale))
    )(x),
    "a scan": lambda x, scale: jax.lax.scan(
        lambda x, _: (jnp.sin(gradient_reversal(x, scale)), None), x, length=1
    )[0],
    "a cond": lambda x, scale: jax.lax.cond(
        scale > -1, gradient_reversal, lambda x, scale: x, x, scale
    ),
    "a vmap": jax.vmap(gradient_reversal, (0, None)),
}


@pytest.mark.parametrize("layer", INSIDE.values(), ids=INSIDE)
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_loss_under_shard_map(check_vma, layer):
    mesh, _ = of_mesh(AxisType.Auto)
    inner = sharded(AxisType.Auto, layer)[0]

    def loss(params, scale, x, domains):
        def each(params, scale, x, domains):
            label, domain, logits = inner(params, scale, x, domains)
            return jax.lax.pmean(label, "data"), jax.lax.pmean(domain, "data"), logits

        spec = PartitionSpec("data")
        return jax.shard_map(
            each,
            mesh=mesh,
            in_specs=(PartitionSpec(), PartitionSpec(), spec, spec),
            out_specs=(PartitionSpec(), PartitionSpec(), spec),
            check_vma=check_vma,
        )(params, scale, x, domains)

    _, params, *args = sharded(AxisType.Auto)
    report = reversal_report(loss, params, *args)
    assert report.problems == ()
    np.testing.assert_allclose(report.strength, 1, rtol=1e-5)


# Notes that a correct model may have: something that is worth a look, and is right.
NOTES = {
    "gaussian_likelihood_of_a_continuous_domain": {"negative_loss"},
    "wasserstein_with_gradient_penalty": {"negative_loss"},
    "identical_features": {"constant_output"},
    "linear_discriminator_that_starts_at_zero": {"constant_output"},
    "last_layer_that_starts_at_zero": {"constant_output"},
    "two_outputs_with_biases_at_zero": {"constant_output"},
}
# An identity that clips on the way back changes how much arrives.
OTHER_STRENGTH = {"clipping_in_front_of_both_heads"}

LOW_PRECISION = {"low_precision_parameters", "mixed_precision"}


@pytest.mark.parametrize("form", ["triple", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_a_correct_model_has_no_problem(name, form):
    loss, params, *args = MODELS[name]()
    report = reversal_report(loss if form == "triple" else total(loss), params, *args)
    assert report.problems == ()
    if name in OTHER_STRENGTH:
        return
    rounding = 0
    if form == "sum":
        # The domain gradient is told by subtraction from the larger label gradient.
        dtype = jnp.bfloat16 if name in LOW_PRECISION else jnp.float32
        together = report.reversed
        if not together.domain_norm:
            return  # Measured nearby, where the two norms are not known.
        rounding = jnp.finfo(dtype).eps * together.label_norm / together.domain_norm
    np.testing.assert_allclose(report.strength, 1, rtol=1e-5 + rounding)
    kinds = {kind for kind, _ in report.notes}
    if form == "triple":
        assert kinds == NOTES.get(name, set())
    else:
        assert kinds <= {"negative_loss"}
    assert "no problem found" in str(report)


def test_there_are_forty_correct_models():
    assert len(MODELS) >= 40
