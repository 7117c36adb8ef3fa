"""Each known mistake, built on purpose: the report must name it, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxgrl.linen
import jaxgrl.nnx
from jaxgrl import (
    domain_loss,
    gradient_reversal,
    multilinear_map,
    reversal_report,
)

BATCH = 24
X = jax.random.normal(jax.random.key(0), (2 * BATCH, 5), jnp.float32)
Y = jnp.argmax(X[:BATCH, :3], axis=1)
DOMAINS = jnp.repeat(jnp.array([0, 1]), BATCH)


def label_loss(logits):
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), Y[:, None], axis=1)
    return -jnp.mean(picked)


def layer(params, x):
    return x @ params["kernel"] + params["bias"][None]


def make_params(dtype=jnp.float32):
    sizes = {"features": (5, 8), "classifier": (8, 3), "hidden": (8, 8), "out": (8, 1)}
    keys = jax.random.split(jax.random.key(1), len(sizes))
    return {
        name: {
            "kernel": (
                jax.random.normal(key, shape, jnp.float32) / shape[0] ** 0.5
            ).astype(dtype),
            "bias": jnp.full(shape[1], 0.1, dtype),
        }
        for key, (name, shape) in zip(keys, sizes.items(), strict=True)
    }


def dann(
    params,
    scale,
    before=gradient_reversal,
    inside=lambda h, scale: h,
    after=lambda z, scale: z,
    combine=lambda label, domain, scale: (label, domain),
):
    """A DANN with places to make a mistake at; the defaults make none."""
    features = jax.nn.tanh(layer(params["features"], X.astype(DTYPE_OF(params))))
    label = label_loss(layer(params["classifier"], features[:BATCH]))
    hidden = jax.nn.relu(layer(params["hidden"], before(features, scale)))
    logits = after(layer(params["out"], inside(hidden, scale)), scale)
    label, domain = combine(label, domain_loss(logits, DOMAINS), scale)
    return label.astype(jnp.float32), domain, logits


def DTYPE_OF(params):  # noqa: N802
    return params["features"]["kernel"].dtype


def mistake(**places):
    return lambda params, scale: dann(params, scale, **places)


def dead_relu(h, scale):
    return jax.nn.relu(h - 100.0)


def softmax_of_one(z, scale):
    return jax.nn.softmax(z)


MISTAKES = {
    "the layer is missing": (
        mistake(before=lambda x, s: x),
        "does the discriminator's input pass through the layer",
    ),
    "a reversal that never runs": (
        mistake(before=lambda x, s: gradient_reversal(x, -1.0)),
        "does the discriminator's input pass through the layer",
    ),
    "scale is not passed on": (
        mistake(before=lambda x, s: gradient_reversal(x)),
        "is `scale` passed on",
    ),
    "a warm start of the layer's own": (
        mistake(before=lambda x, s: gradient_reversal(x, 0.46)),
        "is `scale` passed on",
    ),
    "the features are detached": (
        mistake(before=lambda x, s: jax.lax.stop_gradient(gradient_reversal(x, s))),
        "are the features detached",
    ),
    "reversed twice": (
        mistake(before=lambda x, s: gradient_reversal(gradient_reversal(x, s), s)),
        "reversed twice: features.bias, features.kernel",
    ),
    "the strength is in the loss too": (
        mistake(combine=lambda label, domain, s: (label, s * domain)),
        "the strength is applied twice: layer and loss",
    ),
    "the strength is in the loss only": (
        mistake(
            before=lambda x, s: gradient_reversal(x),
            combine=lambda label, domain, s: (label, s * domain),
        ),
        "`scale` weights the loss, and no layer applies it",
    ),
    "behind the discriminator": (
        mistake(before=lambda x, s: x, after=gradient_reversal),
        "Is the layer behind the discriminator",
    ),
    "inside the discriminator": (
        mistake(before=lambda x, s: x, inside=gradient_reversal),
        "Is the layer behind the discriminator, or inside it",
    ),
    "a second layer, of a strength of its own": (
        mistake(before=lambda x, s: gradient_reversal(gradient_reversal(x, 0.5), s)),
        "Is there a second layer",
    ),
    "a negative scale": (
        mistake(before=lambda x, s: gradient_reversal(x, -s)),
        "the gradient is not reversed: its strength is about -1 x `scale`",
    ),
    "a schedule that ends at 0.46": (
        mistake(before=lambda x, s: gradient_reversal(x, 0.46 * s)),
        "about 0.46 times as strong as `scale`",
    ),
    "constant by construction": (
        mistake(after=softmax_of_one),
        "the discriminator's output is constant",
    ),
    "a discriminator that died": (
        mistake(inside=dead_relu),
        "the discriminator's output is constant",
    ),
}


def both_heads(params, scale):
    """The layer in front of the label classifier too."""
    features = gradient_reversal(jax.nn.tanh(layer(params["features"], X)), scale)
    label = label_loss(layer(params["classifier"], features[:BATCH]))
    hidden = jax.nn.relu(layer(params["hidden"], features))
    logits = layer(params["out"], hidden)
    return label, domain_loss(logits, DOMAINS), logits


def detached_discriminator(params, scale):
    fixed = {k: jax.lax.stop_gradient(params[k]) for k in ("hidden", "out")}
    return dann(params | fixed, scale)


# What the sum of the losses cannot tell, but the two losses and the logits can.
FINER = {
    "the loss is subtracted": (
        mistake(combine=lambda label, domain, s: (label, -domain)),
        "is the domain loss subtracted",
    ),
    "probabilities for logits": (
        mistake(after=lambda z, s: jax.nn.sigmoid(z)),
        "are they probabilities",
    ),
    "the layer in front of both heads": (
        both_heads,
        "the label gradient is reversed too: features.bias, features.kernel",
    ),
    "a discriminator that nothing trains": (
        detached_discriminator,
        "the domain loss trains no discriminator",
    ),
    "a part that goes round the layer": (
        mistake(
            before=lambda x, s: jnp.concatenate(
                [gradient_reversal(x[:, :4], s), x[:, 4:]], axis=1
            )
        ),
        "passes the layer by: features.bias, features.kernel",
    ),
}


def total(loss):
    return lambda params, scale: sum(loss(params, scale)[:2])


def problems(report):
    return " | ".join(report.problems)


@pytest.mark.parametrize("name", MISTAKES | FINER)
def test_the_report_names_the_mistake(name):
    loss, words = (MISTAKES | FINER)[name]
    report = reversal_report(loss, make_params())
    assert words in problems(report)
    assert f"verdict: {report.problems[0]}" in str(report)


@pytest.mark.parametrize("name", MISTAKES)
def test_the_report_names_the_mistake_from_the_sum_alone(name):
    loss, words = MISTAKES[name]
    assert words in problems(reversal_report(total(loss), make_params()))


@pytest.mark.parametrize("name", [n for n in MISTAKES if "constant" not in n])
def test_one_mistake_is_one_problem(name):
    found = reversal_report(MISTAKES[name][0], make_params()).problems
    # A dead discriminator shows twice: nothing comes back, and the logits are constant.
    assert len(found) == (2 if "died" in name else 1), found


def test_a_negative_sum_is_named_too():
    loss = mistake(combine=lambda label, domain, s: (label, -100 * domain))
    found = problems(reversal_report(total(loss), make_params()))
    assert "is the domain loss subtracted" in found


KINDS = {
    "features": "reversed",
    "classifier": "none",
    "hidden": "plain",
    "out": "plain",
}


def check_kinds(report, kinds=KINDS):
    assert report.problems == ()
    for leaf in report.leaves:
        (kind,) = {kind for part, kind in kinds.items() if part in leaf.path}
        assert leaf.domain == kind, leaf
    assert abs(report.strength - 1) < 0.02
    assert "nothing to mend" in str(report)


def test_a_right_model_has_nothing_to_mend():
    check_kinds(reversal_report(dann, make_params()))


def test_a_right_model_has_nothing_to_mend_by_the_sum_alone():
    coarse = {"features": "reversed"} | dict.fromkeys(
        ("classifier", "hidden", "out"), "not reversed"
    )
    report = reversal_report(total(dann), make_params())
    check_kinds(report, coarse)
    assert "as far as the sum of the losses tells" in str(report)


@pytest.mark.parametrize(
    "function",
    [
        lambda s: jnp.clip(s, 0.0, 1.0),
        lambda s: 2 / (1 + jnp.exp(-10 * s)) - 1,  # a schedule of its own
        jnp.sqrt,
        lambda s: s**2,
        lambda s: jnp.where(s > 0, s, 0.0),  # which a nan does not pass
        lambda s: jax.lax.cond(s > 0, lambda: s, lambda: 0.0),
    ],
    ids=["clip", "schedule", "sqrt", "square", "where", "cond"],
)
@pytest.mark.parametrize("form", ["triple", "sum"])
def test_a_loss_may_do_something_to_the_scale(function, form):
    loss = mistake(before=lambda x, s: gradient_reversal(x, function(s)))
    report = reversal_report(loss if form == "triple" else total(loss), make_params())
    assert report.problems == ()
    assert abs(report.strength - 1) < 0.05


@pytest.mark.parametrize("where", ["label", "domain"])
def test_a_weight_penalty_is_no_mistake(where):
    def loss(params, scale):
        label, domain, logits = dann(params, scale)
        penalty = 0.01 * sum(jnp.sum(p**2) for p in jax.tree.leaves(params))
        if where == "label":
            return label + penalty, domain, logits
        return label, domain + penalty, logits

    problems = reversal_report(loss, make_params()).problems
    assert not any("passes the layer by" in p or "behind" in p for p in problems)


@pytest.mark.parametrize("steps", [100, 1000])
def test_a_discriminator_that_is_right_everywhere(steps):
    # Apart by far, and trained without a reversal: the domain loss is next to 0.
    shifted = X.at[BATCH:].add(3.0)

    def loss(params, scale):
        features = jax.nn.tanh(layer(params["features"], shifted))
        hidden = jax.nn.relu(
            layer(params["hidden"], gradient_reversal(features, scale))
        )
        logits = layer(params["out"], hidden)
        label = label_loss(layer(params["classifier"], features[:BATCH]))
        return label, domain_loss(logits, DOMAINS), logits

    def train_step(_, params):
        grads = jax.grad(lambda p: sum(loss(p, 0.0)[:2]))(params)
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)

    params = jax.lax.fori_loop(0, steps, train_step, make_params())
    assert loss(params, 0.0)[1] < 0.1
    assert reversal_report(loss, params).problems == ()


def test_a_domain_specific_parameter_is_asked_about_and_no_more():
    def loss(params, scale):
        features = jax.nn.tanh(layer(params["features"], X))
        shift = jnp.where(DOMAINS[:, None] == 1, params["target only"], 0)
        label = label_loss(layer(params["classifier"], features[:BATCH]))
        hidden = layer(params["hidden"], gradient_reversal(features + shift, scale))
        logits = layer(params["out"], jax.nn.relu(hidden))
        return label, domain_loss(logits, DOMAINS), logits

    params = make_params() | {"target only": jnp.zeros((1, 8), jnp.float32)}
    (found,) = reversal_report(loss, params).problems
    assert "Parameters that only the target uses show here too" in found


def test_complex_parameters():
    def loss(params, scale):
        z = gradient_reversal(params["features"] * X[:, 0].astype(jnp.complex64), scale)
        logits = params["out"] * (z.real + 2 * z.imag)
        label = jnp.mean(jnp.abs(params["features"] - 1) ** 2)
        return label, domain_loss(logits, DOMAINS), logits

    params = {
        "features": jnp.array(0.5 + 0.3j, jnp.complex64),
        "out": jnp.array(1.0, jnp.float32),
    }
    report = reversal_report(loss, params)
    assert report.problems == () and abs(report.strength - 1) < 0.05


def test_low_precision_losses_raise_no_alarm():
    def low(params, scale):
        label, domain, logits = dann(params, scale)
        return label.astype(jnp.bfloat16), domain.astype(jnp.bfloat16), logits

    assert reversal_report(low, make_params(jnp.bfloat16)).problems == ()


def test_a_small_domain_gradient_beside_a_large_label_gradient():
    loss = mistake(combine=lambda label, domain, s: (1e4 * label, domain))
    assert reversal_report(total(loss), make_params()).problems == ()


def test_low_precision_parameters():
    report = reversal_report(dann, make_params(jnp.bfloat16))
    kinds = {leaf.path: leaf.domain for leaf in report.leaves}
    assert report.problems == ()
    assert all(kinds[f"{part}.kernel"] == kind for part, kind in KINDS.items())


@pytest.mark.parametrize("form", ["triple", "sum"])
def test_norms_and_cosine_are_those_of_the_two_gradients(form):
    params = make_params()
    report = reversal_report(dann if form == "triple" else total(dann), params)
    label = jax.grad(lambda p: dann(p, 1.0)[0])(params)["features"]
    # Scale -1 is the identity: the domain gradient without a reversal.
    domain = jax.grad(lambda p: dann(p, -1.0)[1])(params)["features"]
    for name in ("bias", "kernel"):
        (leaf,) = [x for x in report.leaves if x.path == f"features.{name}"]
        norms = [float(jnp.linalg.norm(g[name].ravel())) for g in (label, domain)]
        cosine = float(jnp.vdot(label[name], domain[name])) / (norms[0] * norms[1])
        expected = (*norms, cosine)
        np.testing.assert_allclose(leaf[2:], expected, rtol=2e-4, atol=1e-6)
    flat = [
        jnp.concatenate([g["bias"].ravel(), g["kernel"].ravel()])
        for g in (label, domain)
    ]
    norms = [float(jnp.linalg.norm(g)) for g in flat]
    expected = (*norms, float(jnp.vdot(*flat)) / (norms[0] * norms[1]))
    np.testing.assert_allclose(report.reversed[2:], expected, rtol=2e-4, atol=1e-6)
    assert report.reversed.path == "together: 2 of 8"


def nnx_model(condition=None, **parts):
    rngs = nnx.Rngs(0)
    width = 24 if condition else 8
    return jaxgrl.nnx.DANN(
        nnx.Sequential(
            nnx.Linear(5, 8, rngs=rngs),
            nnx.BatchNorm(8, rngs=rngs),
            nnx.Dropout(0.1, rngs=rngs),
            jnp.tanh,
        ),
        nnx.Linear(8, 3, rngs=rngs),
        nnx.Sequential(
            nnx.Linear(width, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 1, rngs=rngs)
        ),
        condition=condition,
    )


def nnx_loss(model, scale):
    label_logits, domain_logits = model(X, scale)
    domain = domain_loss(domain_logits, DOMAINS)
    return label_loss(label_logits[:BATCH]), domain, domain_logits


NNX_KINDS = {
    "feature_extractor": "reversed",
    "label_classifier": "none",
    "domain_discriminator": "plain",
}


@pytest.mark.parametrize("condition", [None, multilinear_map])
def test_an_nnx_model_and_cdan(condition):
    model = nnx_model(condition)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    report = reversal_report(nnx_loss, model)
    assert report.problems == ()
    for leaf in report.leaves:
        if "mean" in leaf.path or "var" in leaf.path:
            assert leaf.domain == "none"  # statistics of BatchNorm
        elif "layers.0.bias" not in leaf.path:  # which BatchNorm takes off again
            part = leaf.path.partition(".")[0]
            assert leaf.domain == NNX_KINDS[part], leaf
    after = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
    same = jax.tree.map(lambda a, b: bool((a == b).all()), before, after)
    assert all(jax.tree.leaves(same))  # nothing of the model is changed


def test_a_linen_model():
    model = jaxgrl.linen.DANN(
        nn.Sequential([nn.Dense(8), nn.tanh]),
        nn.Dense(3),
        nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(1)]),
    )
    params = model.init(jax.random.key(0), X)

    def loss(params, scale):
        label_logits, domain_logits = model.apply(params, X, scale)
        domain = domain_loss(domain_logits, DOMAINS)
        return label_loss(label_logits[:BATCH]), domain, domain_logits

    check_kinds(reversal_report(loss, params), NNX_KINDS)


def test_a_loss_that_is_not_finite_is_named():
    params = make_params()
    params["features"]["kernel"] = params["features"]["kernel"].at[0, 0].set(jnp.nan)
    assert "the label loss is not finite" in problems(reversal_report(dann, params))
    out_of_range = mistake(combine=lambda label, d, s: (label, d * jnp.nan))
    found = problems(reversal_report(out_of_range, make_params()))
    assert "the domain loss is not finite" in found


def test_it_runs_where_nan_is_an_error():
    with jax.debug_nans(True):
        assert reversal_report(dann, make_params()).problems == ()


@pytest.mark.parametrize(
    "loss, params, error, message",
    [
        (lambda p, s: (p, p), 1.0, TypeError, "`loss` must return a scalar or"),
        (lambda p, s: (p, p, None), 1.0, TypeError, "each an array, got None"),
        (lambda p, s: {"loss": p}, 1.0, TypeError, "each an array, got {'loss'"),
        (lambda p, s: 1, 1.0, TypeError, "`loss` must be floating, got int"),
        (lambda p, s: p, jnp.ones(2), ValueError, r"`loss` must be a scalar, got .*2"),
        (
            lambda p, s: (p, jnp.ones(2), p),
            1.0,
            ValueError,
            r"`domain_loss` must be a scalar, got shape \(2,\)",
        ),
        (lambda p, s: p, {"n": 3}, ValueError, "`params` must have a floating leaf"),
    ],
)
def test_what_is_refused(loss, params, error, message):
    with pytest.raises(error, match=message):
        reversal_report(loss, params)
