"""What the discriminator of a CDAN sees, for heads that are not a softmax too."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxgrl.linen
import jaxgrl.nnx
from jaxgrl import entropy_weights, multilinear_map

FRAMEWORKS = {"nnx": jaxgrl.nnx, "linen": jaxgrl.linen}
FEATURES = np.array([[0.5, -1.0, 2.0], [1.5, 0.25, -0.5]], np.float32)


def identity(y):
    return y


def predictions_of(label_logits, framework="nnx", features=FEATURES, **kwargs):
    """Returns what a network with these label logits gives to its condition."""
    model = FRAMEWORKS[framework].DANN(
        identity,
        lambda features: label_logits,
        identity,
        condition=lambda features, predictions: predictions,
        **kwargs,
    )
    if framework == "nnx":
        return model(features).domain_logits
    return model.apply({}, features).domain_logits


def softmax(z):
    return np.exp(z) / np.exp(z).sum(-1, keepdims=True)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


Z = np.array([[0.3, -1.2, 2.0], [5.0, 0.0, -0.7]], np.float32)
MAP = np.stack([Z, -Z, Z * 2, Z * 0.5], axis=1)  # [2, 4, 3]: a label per position


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("logits", [Z, MAP], ids=["rows", "map"])
@pytest.mark.parametrize(
    "kwargs, expected",
    [
        ({}, softmax),
        ({"activation": jax.nn.softmax}, softmax),
        ({"activation": jax.nn.sigmoid}, sigmoid),
        ({"activation": identity}, identity),
        ({"activation": jnp.square}, np.square),
    ],
    ids=["default", "softmax", "sigmoid", "identity", "another"],
)
def test_predictions_are_the_activation_of_the_logits(
    framework, logits, kwargs, expected
):
    found = predictions_of(logits, framework, **kwargs)
    np.testing.assert_allclose(found, expected(logits), rtol=1e-6)


def test_all_labels_on_and_all_off_are_told_apart():
    on, off = (
        predictions_of(jnp.full((2, 3), z), activation=jax.nn.sigmoid)
        for z in (20.0, -20.0)
    )
    np.testing.assert_allclose(on, np.ones((2, 3)), atol=1e-8)
    np.testing.assert_allclose(off, np.zeros((2, 3)), atol=1e-8)
    # What a softmax makes of both, and why it is not the one to take.
    third = predictions_of(jnp.full((2, 3), -20.0))
    np.testing.assert_allclose(third, np.full((2, 3), 1 / 3), rtol=1e-6)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_box_regression_shows_where_the_box_is(framework):
    boxes = np.array([[10.0, 20.0, 30.0, 40.0], [1.0, 2.0, 3.0, 4.0]], np.float32)
    weights = np.arange(12, dtype=np.float32)

    def domain_logits(boxes):
        model = FRAMEWORKS[framework].DANN(
            identity,
            lambda features: boxes,
            lambda seen: seen @ weights,
            condition=multilinear_map,
            activation=lambda y: y,
        )
        run = model if framework == "nnx" else lambda x: model.apply({}, x)
        return run(FEATURES).domain_logits

    for shift in (0, 100):
        moved = boxes + np.float32(shift)
        expected = np.einsum("bc,bf->bcf", moved, FEATURES).reshape(2, 12) @ weights
        np.testing.assert_allclose(domain_logits(moved), expected, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 1), (2, 4, 1)], ids=str)
def test_a_binary_head_with_one_logit_is_two_classes(shape):
    z = np.linspace(-3, 40, np.prod(shape), dtype=np.float32).reshape(shape)
    found = predictions_of(z, activation=jax.nn.sigmoid)
    two = np.concatenate([np.zeros_like(z), z], axis=-1)
    np.testing.assert_allclose(found, softmax(two.astype(np.float64)), rtol=1e-5)


@pytest.mark.parametrize("activation", [jax.nn.sigmoid, jax.nn.softmax])
def test_a_copy_of_an_activation_is_that_activation(activation):
    # Of a jitted function, copy.deepcopy makes another object.
    again = copy.deepcopy(activation)
    for z in (Z, Z[:, :1]) if activation is jax.nn.sigmoid else (Z,):
        for function in (predictions_of, entropy_weights):
            found, expected = (function(z, activation=f) for f in (again, activation))
            np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match=rf"for jax\.nn\.{activation.__name__}, got"):
        predictions_of(Z[:, 0], activation=again)


def test_a_binary_head_conditions_the_features_on_both_classes():
    rngs = nnx.Rngs(0)
    model = jaxgrl.nnx.DANN(
        identity,
        nnx.Linear(3, 1, rngs=rngs),
        nnx.Linear(6, 1, rngs=rngs),
        condition=multilinear_map,
        activation=jax.nn.sigmoid,
    )
    label_logits, domain_logits = model(FEATURES)
    p = sigmoid(np.asarray(label_logits))
    seen = np.concatenate([(1 - p) * FEATURES, p * FEATURES], axis=1)
    head = model.domain_discriminator
    np.testing.assert_allclose(
        domain_logits, seen @ head.kernel[...] + head.bias[...][None], rtol=1e-5
    )


@pytest.mark.parametrize("activation", [jax.nn.softmax, jax.nn.sigmoid, identity])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_predictions_are_float32_for_logits_of_16_bits(activation, dtype, framework):
    logits = jnp.asarray(Z, dtype)
    found = predictions_of(logits, framework, activation=activation)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, activation(logits.astype(jnp.float32)))


def test_predictions_keep_double_precision():
    with jax.enable_x64(True):
        assert predictions_of(jnp.asarray(Z, jnp.float64)).dtype == jnp.float64


@pytest.mark.parametrize(
    "activation", [jax.nn.softmax, jax.nn.sigmoid, identity, jnp.square]
)
def test_no_gradient_of_the_domain_loss_reaches_the_label_classifier(activation):
    rngs = nnx.Rngs(0)
    model = jaxgrl.nnx.DANN(
        nnx.Linear(3, 4, rngs=rngs),
        nnx.Linear(4, 2, rngs=rngs),
        nnx.Linear(8, 1, rngs=rngs),
        condition=multilinear_map,
        activation=activation,
    )
    grads = nnx.grad(lambda model: model(FEATURES).domain_logits.sum())(model)
    assert not any(g.any() for g in jax.tree.leaves(grads["label_classifier"]))
    assert all(g.any() for g in jax.tree.leaves(grads["feature_extractor"]))


def test_label_logits_may_be_a_tree_for_an_activation_that_knows_it():
    logits = {"class": jnp.asarray(Z, jnp.bfloat16), "box": Z}
    found = predictions_of(logits, activation=identity)
    assert found["class"].dtype == jnp.float32
    np.testing.assert_array_equal(found["box"], Z)
    found = predictions_of(logits, activation=lambda y: jax.nn.softmax(y["class"]))
    np.testing.assert_allclose(found, softmax(np.float32(logits["class"])), rtol=1e-6)


def test_rows_under_vmap_are_the_batch():
    def model(features, logits):
        return predictions_of(logits, features=features)

    np.testing.assert_array_equal(jax.vmap(model)(FEATURES, Z), model(FEATURES, Z))


@pytest.mark.parametrize(
    "shape, activation, shown",
    [
        ((6, 1), jax.nn.softmax, r"C 2 or more .* got shape \(6, 1\)"),
        ((6,), jax.nn.softmax, r"C 2 or more .* got shape \(6,\)"),
        ((6,), jax.nn.sigmoid, r"C 1 or more .* got shape \(6,\)"),
        ((6, 0), jax.nn.sigmoid, r"C 1 or more .* got shape \(6, 0\)"),
        ((), jax.nn.softmax, r"C 2 or more .* got shape \(\)"),
        ({"a": (6, 2)}, jax.nn.softmax, r"C 2 or more .* got shape {'a': \(6, 2\)}"),
        ([(6, 2)], jax.nn.sigmoid, r"C 1 or more .* got shape \[\(6, 2\)\]"),
    ],
)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_head_that_does_not_fit_is_told_what_to_use(
    shape, activation, shown, framework
):
    logits = jax.tree.map(
        lambda s: np.ones(s, np.float32), shape, is_leaf=lambda s: isinstance(s, tuple)
    )
    match = (
        rf"`label_logits` must be \[batch, \.\.\., C\] with {shown}\. For a "
        r"binary head use `activation=jax\.nn\.sigmoid`, shape .* "
        r"`activation=lambda y: y` for a regression"
    )
    with pytest.raises(ValueError, match=match):
        predictions_of(logits, framework, activation=activation)


class OwnCondition(nn.Module):
    @nn.compact
    def __call__(self, features, predictions):
        return nn.Dense(5)(jnp.concatenate([features, predictions], axis=-1))


def test_a_condition_with_parameters_of_its_own_in_linen():
    model = jaxgrl.linen.DANN(
        identity, nn.Dense(2), nn.Dense(1), condition=OwnCondition()
    )
    variables = model.init(jax.random.key(0), FEATURES)
    kernel = variables["params"]["condition"]["Dense_0"]["kernel"]
    assert kernel.shape == (3 + 2, 5)
    assert model.apply(variables, FEATURES).domain_logits.shape == (2, 1)
