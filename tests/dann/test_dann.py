"""The DANN modules: what they compute, in both frameworks, for K domains too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxgrl.linen
import jaxgrl.nnx
from jaxgrl import domain_accuracy, domain_loss, gradient_reversal, multilinear_map

X = jax.random.normal(jax.random.key(0), (6, 4), jnp.float32)


def make_nnx(condition=None, width=5, domains=1):
    rngs = nnx.Rngs(0)
    return jaxgrl.nnx.DANN(
        nnx.Sequential(nnx.Linear(4, 5, rngs=rngs), jnp.tanh),
        nnx.Linear(5, 3, rngs=rngs),
        nnx.Linear(width, domains, rngs=rngs),
        condition=condition,
    )


def make_linen(condition=None, domains=1, **attributes):
    return jaxgrl.linen.DANN(
        nn.Sequential([nn.Dense(5), jnp.tanh]),
        nn.Dense(3),
        nn.Dense(domains),
        condition=condition,
        **attributes,
    )


def weights_of(model):
    """The weights of an NNX model as the parameters of the Linen model."""

    def dense(layer):
        return {"kernel": layer.kernel[...], "bias": layer.bias[...]}

    return {
        "params": {
            "feature_extractor": {"layers_0": dense(model.feature_extractor.layers[0])},
            "label_classifier": dense(model.label_classifier),
            "domain_discriminator": dense(model.domain_discriminator),
        }
    }


@pytest.mark.parametrize("condition, width", [(None, 5), (multilinear_map, 15)])
def test_nnx_linen_and_by_hand_agree_in_values_and_gradients(condition, width):
    model = make_nnx(condition, width)
    params = weights_of(model)
    linen = make_linen(condition)
    assert jax.tree.structure(linen.init(jax.random.key(0), X)) == jax.tree.structure(
        params
    )

    def by_hand(params, scale):
        p = params["params"]
        layer = p["feature_extractor"]["layers_0"]
        features = jnp.tanh(X @ layer["kernel"] + layer["bias"][None])
        head = p["label_classifier"]
        label_logits = features @ head["kernel"] + head["bias"][None]
        seen = features
        if condition:
            probabilities = jax.lax.stop_gradient(jax.nn.softmax(label_logits))
            seen = condition(features, probabilities)
        head = p["domain_discriminator"]
        seen = gradient_reversal(seen, scale)
        return label_logits, seen @ head["kernel"] + head["bias"][None]

    def total(outputs):
        return jnp.sum(jnp.sin(outputs[0])) + jnp.sum(jnp.cos(outputs[1]))

    expected = jax.jit(by_hand)(params, 0.7)
    grads = jax.jit(jax.grad(lambda p: total(by_hand(p, 0.7))))(params)
    for outputs in (model(X, 0.7), linen.apply(params, X, 0.7)):
        assert outputs._fields == ("label_logits", "domain_logits")
        for value, exact in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(value, exact, rtol=1e-5, atol=1e-6)
    found = [
        jax.jit(jax.grad(lambda p: total(linen.apply(p, X, 0.7))))(params),
        weights_of(nnx.merge(nnx.graphdef(model), nnx.grad(nnx_total(total))(model))),
    ]
    for tree in found:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
            tree,
            grads,
        )


def nnx_total(total):
    return lambda model: total(model(X, 0.7))


def test_the_layer_is_visible_and_its_scale_is_the_default():
    model = make_nnx()
    assert isinstance(model.gradient_reversal, jaxgrl.nnx.GradientReversal)
    model.gradient_reversal.scale = 0.3

    def grad(*scale):
        def loss(model):
            return model(X, *scale).domain_logits.sum()

        return nnx.grad(loss)(model)["feature_extractor"]["layers"][0]["kernel"][...]

    np.testing.assert_array_equal(grad(), grad(0.3))
    np.testing.assert_allclose(grad(0.6), 2 * grad(0.3), rtol=1e-6)
    params = make_linen().init(jax.random.key(0), X)
    _, seen = make_linen().apply(params, X, capture_intermediates=True)
    assert "gradient_reversal" in seen["intermediates"]


@pytest.mark.parametrize("make", [make_nnx, make_linen], ids=["nnx", "linen"])
def test_without_a_scale_it_is_one(make):
    model = make()
    variables = {} if make is make_nnx else model.init(jax.random.key(0), X)
    call = model if make is make_nnx else functools.partial(model.apply, variables)

    def grad(*scale):
        return jax.grad(lambda x: call(x, *scale).domain_logits.sum())(X)

    np.testing.assert_array_equal(grad(), grad(1.0))
    np.testing.assert_array_equal(grad(), -grad(-1.0))
    assert (grad() != 0).all()


def test_a_discriminator_that_nobody_uses_is_not_compiled():
    def flops(function):
        return jax.jit(function).lower(X).compile().cost_analysis()["flops"]

    model = make_nnx()
    layer, classify = model.feature_extractor, model.label_classifier
    alone = flops(lambda x: classify(layer(x)))
    assert flops(lambda x: model(x).label_logits) == alone
    assert flops(model) > alone
    linen, params = make_linen(), weights_of(model)
    assert flops(lambda x: linen.apply(params, x).label_logits) == alone


def test_features_and_outputs_of_any_shape():
    model = jaxgrl.nnx.DANN(
        lambda x: {"pooled": x.mean(axis=1), "map": x},
        lambda features: features["map"] * jnp.ones((1, 1, 7)),  # a label per pixel
        lambda features: features["pooled"] @ jnp.ones((1, 4)),  # four domains
    )
    outputs = model(jnp.ones((3, 9, 1)), {"pooled": 0.5, "map": 1.0})
    assert outputs.label_logits.shape == (3, 9, 7)
    assert outputs.domain_logits.shape == (3, 4)
    grad = jax.grad(
        lambda x: model(x, {"pooled": 0.5, "map": 1.0}).domain_logits.sum()
    )(jnp.ones((3, 9, 1)))
    np.testing.assert_allclose(grad, -0.5 * 4 / 9 * jnp.ones((3, 9, 1)), rtol=1e-6)


class RandomMap(nnx.Module):
    """The random projection that CDAN uses for wide features, written by hand."""

    def __init__(self, key):
        of_features, of_classes = jax.random.split(key)
        normal = functools.partial(jax.random.normal, dtype=jnp.float32)
        self.of_features = nnx.Variable(normal(of_features, (5, 11)))
        self.of_classes = nnx.Variable(normal(of_classes, (3, 11)))

    def __call__(self, features, probabilities):
        projected = features @ self.of_features[...]
        return projected * (probabilities @ self.of_classes[...]) / 11**0.5


def test_a_condition_with_matrices_is_part_of_an_nnx_checkpoint():
    model = make_nnx(RandomMap(jax.random.key(0)), 11)
    other = make_nnx(RandomMap(jax.random.key(1)), 11)
    assert (model(X).domain_logits != other(X).domain_logits).all()
    nnx.update(other, nnx.state(model))  # what restoring a checkpoint does
    np.testing.assert_array_equal(model(X).domain_logits, other(X).domain_logits)
    trained = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert all(leaf.shape != (5, 11) for leaf in trained)  # no optimizer changes them


# K domains end to end: two labelled sources and two targets in one batch, of unequal
# numbers, with rows of padding, and with a domain that this batch lacks.


def k_domain_loss(model, x, labels, domains, labelled, real, scale):
    label_logits, domain_logits = model(x, scale)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(
        label_logits, labels
    )
    counts = labelled & real
    number = jnp.sum(counts, dtype=losses.dtype)
    label_loss = jnp.sum(jnp.where(counts, losses, 0)) / jnp.maximum(number, 1)
    return label_loss + domain_loss(domain_logits, domains, num_domains=4, where=real)


@pytest.mark.parametrize("present", [(5, 2, 4, 1), (5, 0, 4, 0)])
def test_padding_and_missing_domains_change_no_gradient(present):
    model = make_nnx(domains=4)
    domains = jnp.repeat(jnp.arange(4), jnp.array(present), total_repeat_length=None)
    n, padding = len(domains), 3
    x = jax.random.normal(jax.random.key(1), (n, 4), jnp.float32)
    labels = jnp.where(domains < 2, jnp.arange(n) % 3, 0)
    grad = nnx.jit(nnx.grad(k_domain_loss))
    exact = grad(model, x, labels, domains, domains < 2, jnp.ones(n, bool), 0.5)
    padded = grad(
        model,
        jnp.concatenate([x, jnp.zeros((padding, 4), jnp.float32)]),
        jnp.concatenate([labels, jnp.zeros(padding, labels.dtype)]),
        jnp.concatenate([domains, jnp.full(padding, -1)]),
        jnp.concatenate([domains < 2, jnp.ones(padding, bool)]),
        jnp.arange(n + padding) < n,
        0.5,
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        nnx.to_pure_dict(padded),
        nnx.to_pure_dict(exact),
    )
    # The labels of the targets are not read.
    others = jnp.where(domains < 2, labels, 2)
    again = grad(model, x, others, domains, domains < 2, jnp.ones(n, bool), 0.5)
    jax.tree.map(
        np.testing.assert_array_equal,
        nnx.to_pure_dict(again),
        nnx.to_pure_dict(exact),
    )


def test_four_domains_are_confused_by_training_and_the_labels_kept():
    # Columns 0 and 1 tell the label, 2 and 3 the domain.
    key = jax.random.key(2)
    x = jax.random.normal(key, (400, 4), jnp.float32)
    domains = jnp.arange(400) % 4
    labels = (x[:, 0] + x[:, 1] > 0).astype(int)
    corners = jnp.array([[-1, -1], [-1, 1], [1, -1], [1, 1]], jnp.float32)
    x = x.at[:, 2:].set(corners[domains] + 0.1 * x[:, 2:])

    def train(scale):
        model = make_nnx(domains=4)
        graphdef, params = nnx.split(model)
        optimizer = optax.sgd(0.05, momentum=0.9)

        def step(state, _):
            params, opt_state = state

            def loss(params):
                return k_domain_loss(
                    nnx.merge(graphdef, params),
                    x,
                    labels,
                    domains,
                    domains < 2,
                    jnp.ones(400, bool),
                    scale,
                )

            updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        state = params, optimizer.init(params)
        (params, _), _ = jax.jit(
            lambda state: jax.lax.scan(step, state, None, length=600)
        )(state)
        outputs = nnx.merge(graphdef, params)(x)
        right = jnp.argmax(outputs.label_logits, axis=1) == labels
        accuracy = domain_accuracy(outputs.domain_logits, domains, num_domains=4)
        return accuracy, right[domains >= 2]

    plain, _ = train(0.0)
    confused, right = train(1.0)
    assert plain > 0.8 and confused < plain - 0.2
    assert right.mean() > 0.85  # chance is 0.5
