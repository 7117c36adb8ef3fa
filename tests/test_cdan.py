"""CDAN's maps and weights, beside values worked out by hand and beside each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrl import (
    domain_loss,
    entropy_weights,
    multilinear_map,
    multilinear_matrices,
    randomized_multilinear_map,
)

FEATURES = jnp.array([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]])
PROBABILITIES = jnp.array([[0.25, 0.75], [1.0, 0.0]])


def test_the_map_is_the_outer_product_worked_out_by_hand():
    expected = [[0.25, 0.5, 0.75, 0.75, 1.5, 2.25], [0.0, -1.0, 0.5, 0.0, 0.0, 0.0]]
    assert multilinear_map(FEATURES, PROBABILITIES).tolist() == expected


def test_a_certain_prediction_puts_the_features_in_the_place_of_its_class():
    joint = multilinear_map(FEATURES, jax.nn.one_hot(jnp.array([1, 0]), 2))
    assert joint[0].tolist() == [0, 0, 0, *FEATURES[0].tolist()]
    assert joint[1].tolist() == [*FEATURES[1].tolist(), 0, 0, 0]


def test_the_randomized_map_by_hand():
    matrices = (jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), jnp.eye(2))
    out = randomized_multilinear_map(FEATURES[:1], PROBABILITIES[:1], matrices)
    expected = np.array([[4 * 0.25, 5 * 0.75]]) / np.sqrt(2)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_inner_products_agree_in_expectation():
    def products(key):
        matrices = multilinear_matrices(key, 3, 2, 64)
        out = randomized_multilinear_map(FEATURES, PROBABILITIES, matrices)
        return out @ out.T

    exact = multilinear_map(FEATURES, PROBABILITIES)
    samples = jax.vmap(products)(jax.random.split(jax.random.key(0), 2000))
    error = jnp.std(samples, axis=0) / len(samples) ** 0.5
    difference = jnp.mean(samples, axis=0) - exact @ exact.T
    assert jnp.all(jnp.abs(difference) < 4 * error)
    assert jnp.all(error < 0.1 * jnp.abs(exact @ exact.T))  # the test can see


def test_matrices_are_fixed_by_the_key_and_independent():
    first, second = (multilinear_matrices(jax.random.key(s), 4, 4, 7) for s in (0, 1))
    again = multilinear_matrices(jax.random.key(0), 4, 4, 7)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert not (first[0] == second[0]).any() and not (first[0] == first[1]).any()


def test_matrices_receive_no_gradient_and_features_do():
    matrices = multilinear_matrices(jax.random.key(0), 3, 2, 5)

    def loss(features, matrices):
        return randomized_multilinear_map(features, PROBABILITIES, matrices).sum()

    grads = jax.grad(loss, (0, 1))(FEATURES, matrices)
    assert (grads[0] != 0).all() and all((g == 0).all() for g in grads[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_maps_keep_the_dtype_of_the_features(dtype):
    matrices = multilinear_matrices(jax.random.key(0), 3, 2, 5)
    features = FEATURES.astype(dtype)
    joint = multilinear_map(features, PROBABILITIES)
    projected = randomized_multilinear_map(features, PROBABILITIES, matrices)
    assert joint.dtype == projected.dtype == dtype
    exact = multilinear_map(features.astype(jnp.float32), PROBABILITIES)
    np.testing.assert_array_equal(joint, exact.astype(dtype))  # rounded once


def test_empty_batches_and_more_leading_axes():
    assert multilinear_map(jnp.ones((0, 3)), jnp.ones((0, 2))).shape == (0, 6)
    stacked = multilinear_map(FEATURES[None], PROBABILITIES[None])
    mapped = jax.vmap(multilinear_map)(FEATURES, PROBABILITIES)
    assert (stacked[0] == mapped).all()


def test_weights_worked_out_by_hand():
    # Entropies 0, log 2 and log 2: 1 + exp(-H) is 2, 1.5 and 1.5.
    logits = jnp.array([[200.0, 0.0], [0.0, 0.0], [7.0, 7.0], [0.0, 200.0]])
    domains = jnp.array([0, 0, 1, 1])
    np.testing.assert_allclose(
        entropy_weights(logits, domains), [8 / 7, 6 / 7, 6 / 7, 8 / 7], rtol=1e-6
    )
    np.testing.assert_allclose(entropy_weights(logits[:3]), [1.2, 0.9, 0.9], rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_weights_have_mean_one_in_each_domain(jit):
    logits = 3 * jax.random.normal(jax.random.key(0), (40, 5), jnp.float32)
    domains = jnp.array([0] * 25 + [3] * 10 + [7] * 5)  # any integers, unequal, gaps
    where = jnp.arange(40) % 4 != 0
    function = jax.jit(entropy_weights) if jit else entropy_weights
    weights = function(logits, domains, where=where)
    for d in (0, 3, 7):
        np.testing.assert_allclose(weights[where & (domains == d)].mean(), 1, rtol=1e-6)
    assert (weights[~where] == 0).all() and (weights[where] > 0.5).all()


def test_weights_pass_no_gradient_and_survive_what_is_masked():
    logits = jnp.array([[1.0, -1.0], [jnp.nan, jnp.inf], [0.2, 0.1]])
    where = jnp.array([True, False, True])

    def weighted(logits):
        return (entropy_weights(logits, where=where) * jnp.arange(3.0)).sum()

    value, grad = jax.value_and_grad(weighted)(logits)
    assert jnp.isfinite(value) and (grad == 0).all()


def test_a_row_that_counts_and_is_nan_shows():
    logits = jnp.array([[jnp.nan, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert jnp.isnan(entropy_weights(logits)).all()
    impossible = jnp.array([[-jnp.inf, 0.0], [0.0, 0.0]])  # a certain row: entropy 0
    np.testing.assert_allclose(entropy_weights(impossible), [8 / 7, 6 / 7], rtol=1e-6)


def test_no_row_that_counts_is_no_weight():
    assert entropy_weights(jnp.zeros((0, 3))).shape == (0,)
    nothing = entropy_weights(jnp.ones((2, 3)), where=jnp.zeros(2, bool))
    assert nothing.tolist() == [0, 0]


def test_weights_in_the_domain_loss():
    logits, domains = jnp.array([0.3, -1.0, 2.0, 0.1]), jnp.array([0, 0, 1, 1])
    weights = jnp.array([0.5, 1.5, 1.2, 0.8])
    losses = jnp.logaddexp(0, jnp.where(domains == 1, -logits, logits))
    expected = ((weights * losses)[:2].mean() + (weights * losses)[2:].mean()) / 2
    np.testing.assert_allclose(
        domain_loss(logits, domains, weights=weights), expected, rtol=1e-6
    )
    np.testing.assert_allclose(
        domain_loss(logits, domains, weights=jnp.ones(4)),
        domain_loss(logits, domains),
        rtol=1e-6,
    )


def test_a_masked_weight_may_be_anything():
    where = jnp.array([True, True, False])
    args = jnp.array([0.3, -1.0, 2.0]), jnp.array([0, 1, 1])
    loss = domain_loss(*args, where=where, weights=jnp.array([1.0, 1.0, jnp.nan]))
    np.testing.assert_allclose(loss, domain_loss(*args, where=where), rtol=1e-6)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: multilinear_map(jnp.ones((2, 3)), jnp.ones((3, 2))),
            ValueError,
            r"`probabilities` must have the leading axes of `features`, got shape "
            r"\(3, 2\) for `features` of shape \(2, 3\)",
        ),
        (
            lambda: multilinear_map(jnp.ones((2, 3), int), jnp.ones((2, 2))),
            TypeError,
            "`features` must be floating, got int",
        ),
        (
            lambda: randomized_multilinear_map(
                FEATURES, PROBABILITIES, (jnp.ones((3, 5)), jnp.ones((2, 4)))
            ),
            ValueError,
            r"`matrices` must have shapes \[F, D\] and \[C, D\] with F = 3 and C = 2",
        ),
        (
            lambda: multilinear_matrices(jax.random.key(0), 3, 0, 5),
            ValueError,
            "`num_classes` must be 1 or more, got 0",
        ),
        (
            lambda: entropy_weights(jnp.ones(3)),
            ValueError,
            r"`label_logits` must have shape \[batch, C\] .*, got shape \(3,\)",
        ),
        (
            lambda: entropy_weights(jnp.ones((3, 2)), jnp.zeros(2, int)),
            ValueError,
            r"`domains` must have shape \[batch\] = \(3,\), got shape \(2,\)",
        ),
        (
            lambda: domain_loss(jnp.ones(2), jnp.array([0, 1]), weights=jnp.ones(3)),
            ValueError,
            r"`weights` must have shape \[batch\] = \(2,\), got shape \(3,\)",
        ),
        (
            lambda: domain_loss(jnp.ones(2), jnp.array([0, 1]), weights=[1, 1]),
            TypeError,
            "`weights` must have a floating dtype, got int",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
