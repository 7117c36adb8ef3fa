"""CDAN's map and weights, beside values worked out by hand and beside each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrl import domain_loss, entropy_weights, multilinear_map

FEATURES = jnp.array([[1.0, 2.0, 3.0], [0.0, -1.0, 0.5]])
PROBABILITIES = jnp.array([[0.25, 0.75], [1.0, 0.0]])


def test_the_map_is_the_outer_product_worked_out_by_hand():
    expected = [[0.25, 0.5, 0.75, 0.75, 1.5, 2.25], [0.0, -1.0, 0.5, 0.0, 0.0, 0.0]]
    assert multilinear_map(FEATURES, PROBABILITIES).tolist() == expected


def test_a_certain_prediction_puts_the_features_in_the_place_of_its_class():
    joint = multilinear_map(FEATURES, jax.nn.one_hot(jnp.array([1, 0]), 2))
    assert joint[0].tolist() == [0, 0, 0, *FEATURES[0].tolist()]
    assert joint[1].tolist() == [*FEATURES[1].tolist(), 0, 0, 0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_map_keeps_the_dtype_of_the_features(dtype):
    features = FEATURES.astype(dtype)
    joint = multilinear_map(features, PROBABILITIES)
    assert joint.dtype == dtype
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
    domains = jnp.array([0] * 25 + [3] * 10 + [7] * 5)  # unequal, with gaps
    where = jnp.arange(40) % 4 != 0
    function = functools.partial(entropy_weights, num_domains=8)
    weights = (jax.jit(function) if jit else function)(logits, domains, where=where)
    for d in (0, 3, 7):
        np.testing.assert_allclose(weights[where & (domains == d)].mean(), 1, rtol=1e-6)
    assert (weights[~where] == 0).all() and (weights[where] > 0.5).all()


def _naive_weights(logits, domains, where, sigmoid):
    """Returns the weights of rows of any shape by loops, in float64."""
    logits = np.asarray(logits, np.float64)
    entropies = np.zeros(logits.shape[:-1])
    for row in np.ndindex(entropies.shape):
        z = logits[row]
        if sigmoid:
            p = 1 / (1 + np.exp(-z))
            entropies[row] = sum(-q * np.log(q) - (1 - q) * np.log(1 - q) for q in p)
        else:
            p = np.exp(z) / np.exp(z).sum()
            entropies[row] = -(p * np.log(p)).sum()
    domains, where = (np.broadcast_to(a, entropies.shape) for a in (domains, where))
    values = np.where(where, 1 + np.exp(-entropies), 0)
    for d in np.unique(domains[where]):
        values[domains == d] /= values[where & (domains == d)].mean()
    return values


@pytest.mark.parametrize("sigmoid", [False, True], ids=["softmax", "sigmoid"])
@pytest.mark.parametrize(
    "shape, domains_shape",
    [((9, 4), (9,)), ((6, 5, 3), (6, 1)), ((4, 3, 2, 2), (4, 3, 1))],
)
def test_weights_of_rows_of_any_shape(shape, domains_shape, sigmoid):
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=shape).astype(np.float32)
    domains = rng.integers(3, size=domains_shape)
    where = rng.uniform(size=shape[:-1]) > 0.3
    activation = jax.nn.sigmoid if sigmoid else jax.nn.softmax
    weights = entropy_weights(
        logits, domains, num_domains=3, where=where, activation=activation
    )
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(
        weights, _naive_weights(logits, domains, where, sigmoid), rtol=1e-5
    )


def test_one_logit_is_a_binary_head_and_labels_add():
    z = jnp.array([[0.3], [-2.0], [5.0]])
    domains = jnp.array([0, 1, 1])
    two = jnp.concatenate([jnp.zeros_like(z), z], axis=1)
    one = entropy_weights(z, domains, activation=jax.nn.sigmoid)
    np.testing.assert_allclose(one, entropy_weights(two, domains), rtol=1e-6)
    # Certain of one label, a coin for each of two: 1 + 1, and 1 + 1/4.
    labels = jnp.array([[99.0, -99.0], [0.0, 0.0]])
    weights = entropy_weights(labels, activation=jax.nn.sigmoid)
    np.testing.assert_allclose(weights, np.array([2, 1.25]) / 1.625, rtol=1e-6)


@pytest.mark.parametrize("activation", [jax.nn.softmax, jax.nn.sigmoid])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_pass_no_gradient_and_survive_what_is_masked(dtype, activation):
    logits = jnp.array([[1.0, -1.0], [jnp.nan, jnp.inf], [0.2, 0.1]], dtype)
    where = jnp.array([True, False, True])
    domains = jnp.array([0, 99, 1])

    def weighted(logits):
        weights = entropy_weights(logits, domains, where=where, activation=activation)
        return (weights * jnp.arange(3, dtype=jnp.float32)).sum()

    with jax.debug_nans(True):
        value = weighted(logits)  # eager, where even a cast of nan raises
        grad = jax.jit(jax.grad(weighted))(logits)
    assert jnp.isfinite(value) and (grad == 0).all()


def test_low_precision_logits_have_weights_in_float32():
    logits = jax.random.normal(jax.random.key(0), (9, 3), jnp.bfloat16)
    wide = entropy_weights(logits.astype(jnp.float32))
    np.testing.assert_array_equal(entropy_weights(logits), wide)


def test_a_row_that_counts_and_is_nan_shows():
    logits = jnp.array([[jnp.nan, 0.0], [1.0, 0.0], [0.0, 0.0]])
    assert jnp.isnan(entropy_weights(logits)).all()
    of_one = entropy_weights(logits, jnp.array([0, 0, 1]))
    assert jnp.isnan(of_one).tolist() == [True, True, False]
    impossible = jnp.array([[-jnp.inf, 0.0], [0.0, 0.0]])  # a certain row: entropy 0
    with jax.debug_nans(True):
        weights = entropy_weights(impossible)
    np.testing.assert_allclose(weights, [8 / 7, 6 / 7], rtol=1e-6)
    label = jnp.array([[-jnp.inf], [0.0], [jnp.inf]])
    weights = entropy_weights(label, activation=jax.nn.sigmoid)
    np.testing.assert_allclose(weights, np.array([2, 1.5, 2]) / 5.5 * 3, rtol=1e-6)


def test_a_traced_domain_out_of_range_has_weight_nan():
    weights = jax.jit(entropy_weights)(jnp.zeros((3, 2)), jnp.array([0, 2, -1]))
    assert jnp.isnan(weights).tolist() == [False, True, True] and weights[0] == 1


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
            lambda: entropy_weights(jnp.ones(3)),
            ValueError,
            r"`label_logits` must be \[batch, \.\.\., C\] with C 2 or more for "
            r"jax.nn.softmax, got shape \(3,\)\. .*pass its `axis_name`\.$",
        ),
        (
            lambda: entropy_weights(jnp.ones(3), activation=jax.nn.sigmoid),
            ValueError,
            r"with C 1 or more for jax.nn.sigmoid, got shape \(3,\)",
        ),
        (
            lambda: entropy_weights(jnp.ones((3, 1))),
            ValueError,
            r"got shape \(3, 1\)\. For a binary head use `activation=jax.nn.sigmoid`, "
            r".* A regression head has no entropy: leave `weights` out",
        ),
        (
            lambda: entropy_weights(jnp.ones((3, 0)), activation=jax.nn.sigmoid),
            ValueError,
            r"with C 1 or more for jax.nn.sigmoid, got shape \(3, 0\)",
        ),
        (
            lambda: entropy_weights(jnp.ones((3, 2)), activation=lambda y: y),
            ValueError,
            r"`activation` must be jax.nn.softmax or jax.nn.sigmoid, got <function .*"
            r"A regression head has no entropy: leave `weights` out",
        ),
        (
            lambda: entropy_weights(jnp.ones((3, 2), int)),
            TypeError,
            "`label_logits` must be floating, got int",
        ),
        (
            lambda: entropy_weights(jnp.ones((3, 2)), jnp.zeros(2, int)),
            ValueError,
            r"`domains` must have shape \(3,\), or 1 .*, got shape \(2,\)\.$",
        ),
        (
            lambda: entropy_weights(jnp.ones((3, 4, 2)), jnp.zeros(3, int)),
            ValueError,
            r"`domains` must have shape \(3, 4\).*Use `domains\[:, None\]`\.$",
        ),
        (
            lambda: entropy_weights(jnp.ones((3, 2)), jnp.array([0, 7, 1])),
            ValueError,
            "`domains` must lie in 0 to 1 .* got 0 to 7",
        ),
        (
            lambda: domain_loss(jnp.ones(2), jnp.array([0, 1]), weights=jnp.ones(3)),
            ValueError,
            r"`weights` must have shape \(2,\), or 1 .*, got shape \(3,\)",
        ),
        (
            lambda: domain_loss(jnp.ones(2), jnp.array([0, 1]), weights=[1, 1]),
            TypeError,
            "`weights` must be floating, got int",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
