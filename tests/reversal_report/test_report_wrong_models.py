"""Each known mistake, built on purpose: the report must name it, and nothing else."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen as nn
from flax import nnx
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
    total,
)

import jaxgrl.linen
import jaxgrl.nnx
from jaxgrl import domain_loss, gradient_reversal, multilinear_map, reversal_report


def reverse_twice(x, scale):
    for _ in range(2):
        x = gradient_reversal(x, scale)
    return x


def a_scan_of(layer, length):
    return lambda x, s: jax.lax.scan(
        lambda x, _: (layer(x, s), None), x, length=length
    )[0]


@jax.custom_vjp
def without_the_minus(x, scale):
    return x


without_the_minus.defvjp(lambda x, s: (x, s), lambda s, g: (s * g, None))


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1, 1),))


def weighted(z, s):
    return s * domain_loss(z, DOMAINS)


def without_scale(x, scale):
    return gradient_reversal(x)


def no_layer(x, scale):
    return x


def stopped(x, scale):
    return jax.lax.stop_gradient(x)


# name -> (kind as a triple, kind as the sum or None, the parts of the DANN)
MISTAKES = {
    # The layer is missing.
    "no_layer": ("missing", "missing", {"layer": no_layer}),
    "a_scale_of_minus_one": (
        "missing",
        "missing",
        {"layer": lambda x, s: gradient_reversal(x, -1.0)},
    ),
    "a_negative_scale": (
        "missing",
        "missing",
        {"layer": lambda x, s: gradient_reversal(x, -s)},
    ),
    "a_rule_without_the_minus": ("missing", "missing", {"layer": without_the_minus}),
    "optax_without_the_minus": ("missing", "missing", {"layer": optax.scale_gradient}),
    "clipping_instead": ("missing", "missing", {"layer": lambda x, s: clipped(x)}),
    "the_result_is_not_used": (
        "missing",
        "missing",
        {"layer": lambda x, s: (gradient_reversal(x, s), x)[1]},
    ),
    "the_layer_on_the_input": (
        "missing",
        "missing",
        {
            "layer": no_layer,
            "encode": lambda p, s: jnp.tanh(
                dense(p["features"], gradient_reversal(X, s))
            ),
        },
    ),
    "the_layer_on_the_output_of_stop_gradient": (
        "detached",
        "missing",
        {"layer": lambda x, s: gradient_reversal(jax.lax.stop_gradient(x), s)},
    ),
    "missing_in_a_scan": ("missing", "missing", {"layer": a_scan_of(no_layer, 2)}),
    "missing_under_jit_and_remat": (
        "missing",
        "missing",
        {"layer": jax.jit(jax.checkpoint(no_layer))},
    ),
    "in_front_of_the_label_head_instead": (
        {"missing", "label_reversed"},
        None,
        {
            "layer": no_layer,
            "classify": lambda p, f, s: classify(p, gradient_reversal(f, s), s),
        },
    ),
    # The scale is not passed on.
    "no_scale": ("scale_unused", "scale_unused", {"layer": without_scale}),
    "a_strength_of_its_own": (
        "scale_unused",
        "scale_unused",
        {"layer": lambda x, s: gradient_reversal(x, 0.46)},
    ),
    "the_sign_of_the_scale": (
        "scale_unused",
        "scale_unused",
        {"layer": lambda x, s: gradient_reversal(x, jnp.sign(s))},
    ),
    "optax_with_a_fixed_scale": (
        "scale_unused",
        "scale_unused",
        {"layer": lambda x, s: optax.scale_gradient(x, -1.0)},
    ),
    "no_scale_in_a_scan": (
        "scale_unused",
        "scale_unused",
        {"layer": a_scan_of(without_scale, 1)},
    ),
    # The features are detached.
    "detached_behind_the_layer": (
        "detached",
        "missing",
        {"layer": lambda x, s: jax.lax.stop_gradient(gradient_reversal(x, s))},
    ),
    "detached_without_a_layer": ("detached", "missing", {"layer": stopped}),
    "rounded_features": (
        "detached",
        "missing",
        {"layer": lambda x, s: jnp.round(9 * gradient_reversal(x, s))},
    ),
    "a_frozen_encoder": (
        "detached",
        "missing",
        {"encode": lambda p, s: encode(jax.lax.stop_gradient(p), s)},
    ),
    # More than one layer.
    "twice": (
        "twice",
        "twice",
        {"layer": lambda x, s: gradient_reversal(gradient_reversal(x, s), s)},
    ),
    "twice_in_a_loop": ("twice", "twice", {"layer": reverse_twice}),
    "twice_with_small_features": (
        "twice",
        "twice",
        {"layer": lambda x, s: 1e-4 * reverse_twice(x, s)},
    ),
    "twice_under_jit": ("twice", "twice", {"layer": jax.jit(reverse_twice)}),
    "twice_in_a_scan": ("twice", "twice", {"layer": a_scan_of(gradient_reversal, 2)}),
    "a_second_strength": (
        "twice",
        "twice",
        {"layer": lambda x, s: gradient_reversal(gradient_reversal(x, 0.5), s)},
    ),
    "a_second_layer_without_scale": (
        "twice",
        "twice",
        {"layer": lambda x, s: without_scale(jax.jit(gradient_reversal)(x, s), s)},
    ),
    "two_ways_to_write_it": (
        "twice",
        "twice",
        {
            "layer": lambda x, s: optax.scale_gradient(
                gradient_reversal(x, s, forward_mode=True), -1.0
            )
        },
    ),
    # The scale in the loss.
    "scale_in_layer_and_loss": (
        "scale_in_loss",
        "scale_in_loss",
        {"domain_loss": weighted},
    ),
    "scale_in_the_loss_alone": (
        "scale_in_loss",
        "scale_in_loss",
        {"domain_loss": weighted, "layer": without_scale},
    ),
    "scale_in_the_loss_without_a_layer": (
        "scale_in_loss",
        "scale_in_loss",
        {"domain_loss": weighted, "layer": no_layer},
    ),
    "a_schedule_in_the_loss": (
        "scale_in_loss",
        "scale_in_loss",
        {"domain_loss": lambda z, s: jnp.tanh(3 * s) * domain_loss(z, DOMAINS)},
    ),
    "scale_in_the_label_loss": (
        "scale_in_loss",
        "scale_in_loss",
        {"label_loss": lambda z, s: (2 - s) * label_loss(z)},
    ),
    "scale_multiplies_the_features": (
        "scale_in_loss",
        "scale_in_loss",
        {"layer": lambda x, s: s * gradient_reversal(x)},
    ),
    # The layer is in the wrong place.
    "behind_the_discriminator": (
        "behind",
        "only_reversed",
        {
            "layer": no_layer,
            "discriminate": lambda p, h, s: gradient_reversal(discriminate(p, h, s), s),
        },
    ),
    "on_the_domain_loss": (
        "behind",
        "only_reversed",
        {
            "layer": no_layer,
            "domain_loss": lambda z, s: gradient_reversal(domain_loss(z, DOMAINS), s),
        },
    ),
    "inside_the_discriminator": (
        "only_reversed",
        "only_reversed",
        {
            "layer": no_layer,
            "hide": lambda p, f, s: gradient_reversal(hide(p, f, s), s),
        },
    ),
    "in_front_of_both_heads": (
        "label_reversed",
        "only_reversed",
        {"layer": no_layer, "encode": lambda p, s: gradient_reversal(encode(p, s), s)},
    ),
    "in_front_of_each_head": (
        "label_reversed",
        "only_reversed",
        {"classify": lambda p, f, s: classify(p, gradient_reversal(f, s), s)},
    ),
    "a_part_goes_round_the_layer": (
        "bypassed",
        None,
        {
            "layer": lambda x, s: jnp.concatenate(
                [gradient_reversal(x[:, :4], s), x[:, 4:]], axis=1
            )
        },
    ),
    "a_residual_round_the_layer": (
        "bypassed",
        None,
        {"layer": lambda x, s: gradient_reversal(x, s) + 0.1 * x},
    ),
    # The strength.
    "a_schedule_that_ends_at_0.46": (
        "strength",
        "strength",
        {"layer": lambda x, s: gradient_reversal(x, 0.46 * s)},
    ),
    "ten_times_the_scale": (
        "strength",
        "strength",
        {"layer": lambda x, s: gradient_reversal(x, 10 * s)},
    ),
    # The discriminator.
    "softmax_of_one_logit": (
        {"no_domain_gradient", "constant_output"},
        "missing",
        {"discriminate": lambda p, h, s: jax.nn.softmax(discriminate(p, h, s))},
    ),
    "logits_times_zero": (
        {"no_domain_gradient", "constant_output"},
        "missing",
        {"discriminate": lambda p, h, s: 0 * discriminate(p, h, s)},
    ),
    "a_discriminator_that_died": (
        "constant_output",
        "missing",
        {"hide": lambda p, f, s: jax.nn.relu(hide(p, f, s) - 100.0)},
    ),
    "sigmoid": (
        "probabilities",
        None,
        {"discriminate": lambda p, h, s: jax.nn.sigmoid(discriminate(p, h, s))},
    ),
    "domain_loss_subtracted": (
        "negative_loss",
        None,
        {"domain_loss": lambda z, s: -domain_loss(z, DOMAINS)},
    ),
    "a_detached_discriminator": (
        "untrained",
        None,
        {
            "hide": lambda p, f, s: hide(jax.lax.stop_gradient(p), f, s),
            "discriminate": lambda p, h, s: discriminate(
                jax.lax.stop_gradient(p), h, s
            ),
        },
    ),
    "a_domain_loss_of_nan": (
        "not_finite",
        "not_finite",
        {"domain_loss": lambda z, s: jnp.nan * domain_loss(z, DOMAINS)},
    ),
    "a_label_loss_of_inf": (
        "not_finite",
        "not_finite",
        {"label_loss": lambda z, s: label_loss(z) / 0.0},
    ),
    "a_gradient_of_nan": (
        "not_finite",
        "not_finite",
        {"label_loss": lambda z, s: label_loss(z) + jnp.sum(jnp.sqrt(0 * z))},
    ),
}


def kinds_of(report):
    return {kind for kind, _ in (*report.problems, *report.notes)}


def as_set(kinds):
    return kinds if isinstance(kinds, set) else {kinds}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_and_nothing_else(name):
    expected, _, parts = MISTAKES[name]
    report = reversal_report(dann(**parts), make_params())
    assert kinds_of(report) == as_set(expected)
    shown = " ".join(str(report).split())
    assert all(f"({kind}): {text}" in shown for kind, text in report.problems)
    assert ("no problem found" in shown) == (not report.problems)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in MISTAKES if MISTAKES[n][1]])
def test_the_sum_of_the_losses_names_it_too(name):
    _, expected, parts = MISTAKES[name]
    report = reversal_report(total(dann(**parts)), make_params())
    assert kinds_of(report) == {expected}


# ---- mistakes that need a model of their own

WHOLE = {}


def model(kind):
    """Registers a function that returns (loss, params, *args), with its kind."""

    def register(function):
        WHOLE[function.__name__] = kind, function
        return function

    return register


def flax_loss(apply):
    def loss(params, scale):
        label_logits, logits = apply(params, scale)
        return label_loss(label_logits[:BATCH]), domain_loss(logits, DOMAINS), logits

    return loss


class Reversed(nnx.Module):
    """A discriminator with a layer of its own."""

    def __init__(self, discriminator):
        self.discriminator = discriminator

    def __call__(self, x):
        return self.discriminator(gradient_reversal(x))


def nnx_dann(wrap=lambda discriminator: discriminator, condition=None):
    rngs = nnx.Rngs(0)
    discriminator = nnx.Sequential(
        nnx.Linear(24 if condition else 8, 8, rngs=rngs),
        nnx.relu,
        nnx.Linear(8, 1, rngs=rngs),
    )
    return jaxgrl.nnx.DANN(
        nnx.Sequential(nnx.Linear(5, 8, rngs=rngs), jnp.tanh),
        nnx.Linear(8, 3, rngs=rngs),
        wrap(discriminator),
        condition=condition,
    )


@model("twice")
def nnx_dann_with_a_second_layer():
    return flax_loss(lambda model, s: model(X, s)), nnx_dann(Reversed)


@model("scale_unused")
def nnx_dann_without_scale():
    return flax_loss(lambda model, s: model(X)), nnx_dann()


@model("twice")
def linen_dann_with_a_second_layer():
    model = jaxgrl.linen.DANN(
        nn.Sequential([nn.Dense(8), nn.tanh]),
        nn.Dense(3),
        nn.Sequential([jaxgrl.linen.GradientReversal(), nn.Dense(8), nn.Dense(1)]),
    )
    params = model.init(jax.random.key(0), X)
    return flax_loss(lambda p, s: model.apply(p, X, s)), params


@model("twice")
def one_part_passes_two_layers():
    def loss(params, scale):
        first = jnp.tanh(X @ params["first"])
        second = jnp.tanh(X @ params["second"])
        seen = 3 * gradient_reversal(first, scale) + reverse_twice(second, scale)
        logits = discriminate(params, hide(params, seen, scale), scale)
        label = label_loss(classify(params, first + second, scale))
        return label, domain_loss(logits, DOMAINS), logits

    params = make_params()
    kernel = params.pop("features")["kernel"]
    return loss, params | {"first": kernel, "second": kernel[::-1]}


@model("bypassed")
def conditioned_on_predictions_that_go_round_the_layer():
    def loss(p, scale):
        features = encode(p, scale)
        label_logits = dense(p["classifier"], features)
        seen = gradient_reversal(features, scale)
        joint = multilinear_map(seen, jax.nn.softmax(label_logits))
        logits = discriminate(p, hide(p, joint, scale), scale)
        return label_loss(label_logits[:BATCH]), domain_loss(logits, DOMAINS), logits

    return loss, make_params(width=24)


@model("untrained")
def a_discriminator_that_is_not_in_params():
    def loss(params, scale, discriminator):
        return dann()(params | discriminator, scale)

    params = make_params()
    discriminator = {name: params.pop(name) for name in ("hidden", "out")}
    return loss, params, discriminator


@model("probabilities")
def softmax_of_two_logits():
    last = lambda p, h, s: jax.nn.softmax(discriminate(p, h, s))  # noqa: E731
    return dann(discriminate=last), make_params(outputs=2)


@model("behind")
def behind_two_logits():
    last = lambda p, h, s: gradient_reversal(discriminate(p, h, s), s)  # noqa: E731
    return dann(layer=no_layer, discriminate=last), make_params(outputs=2)


@model("not_finite")
def a_parameter_of_nan():
    params = make_params()
    params["features"]["kernel"] = params["features"]["kernel"].at[0, 0].set(jnp.nan)
    return dann(), params


@model({"missing", "constant_output"})
def no_layer_and_a_discriminator_that_starts_at_zero():
    params = make_params()
    params["out"] = jax.tree.map(jnp.zeros_like, params["out"])
    return dann(layer=no_layer), params


@model({"detached", "constant_output"})
def detached_and_a_discriminator_that_starts_at_zero():
    params = make_params()
    params["out"] = jax.tree.map(jnp.zeros_like, params["out"])
    return dann(layer=lambda x, s: jax.lax.stop_gradient(x)), params


@model({"detached", "constant_output"})
def detached_and_a_discriminator_of_zeros():
    # With as many rows of each domain, no gradient of it is other than 0 here.
    params = make_params()
    zeros = {k: jax.tree.map(jnp.zeros_like, params[k]) for k in ("hidden", "out")}
    return dann(layer=lambda x, s: jax.lax.stop_gradient(x)), params | zeros


@pytest.mark.parametrize("name", WHOLE)
def test_a_wrong_model_is_named(name):
    expected, build = WHOLE[name]
    loss, params, *args = build()
    assert kinds_of(reversal_report(loss, params, *args)) == as_set(expected)


def test_there_are_forty_wrong_models():
    assert len(MISTAKES) + len(WHOLE) >= 40


def test_twice_names_the_part_that_passes_two_layers():
    loss, params = WHOLE["one_part_passes_two_layers"][1]()
    report = reversal_report(loss, params)
    assert report.strength > 0  # That of both parts together.
    (problem,) = report.problems
    assert "two layers, which cancel: second. Keep" in problem.text


def test_several_mistakes_are_named_together():
    loss = dann(
        encode=lambda p, s: gradient_reversal(encode(p, s)),
        layer=no_layer,
        domain_loss=lambda z, s: -domain_loss(z, DOMAINS),
        discriminate=lambda p, h, s: jax.nn.sigmoid(discriminate(p, h, s)),
    )
    report = reversal_report(loss, make_params())
    assert [kind for kind, _ in report.problems] == [
        "scale_unused",
        "label_reversed",
        "probabilities",
    ]
    assert [kind for kind, _ in report.notes] == ["negative_loss"]


# ---- a reversal that cannot be read


# With a strength of 10 the loss changes with the scale, by rounding.
@pytest.mark.parametrize("strength", [1, 10])
@pytest.mark.parametrize("form", ["triple", "sum"])
def test_a_reversal_by_stop_gradient_is_asked_about(form, strength):
    def trick(x, scale):
        scale = strength * scale
        return jax.lax.stop_gradient((1 + scale) * x) - scale * x

    loss = dann(layer=trick)
    loss = loss if form == "triple" else total(loss)
    report = reversal_report(loss, make_params())
    assert report.problems == ()
    assert kinds_of(report) == {"unreadable"}
    assert "written with stop_gradient?" in report.notes[0].text
