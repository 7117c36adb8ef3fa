"""The numbers that judge a trained network without target labels."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrl import information_maximization, proxy_a_distance


def test_infomax_by_hand():
    logits = jnp.log(jnp.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]]))
    p = np.array([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])
    mean = p.mean(axis=0)
    expected = -(mean * np.log(mean)).sum() + (p * np.log(p)).sum(axis=1).mean()
    np.testing.assert_allclose(information_maximization(logits), expected, rtol=1e-5)


def test_infomax_is_log_c_at_most_and_0_at_least():
    certain = 100 * jnp.eye(5)
    infomax = jax.jit(information_maximization)
    np.testing.assert_allclose(infomax(certain), math.log(5), rtol=1e-6)
    assert abs(infomax(jnp.zeros((4, 5)))) < 1e-6
    assert abs(infomax(certain[:1].repeat(4, axis=0))) < 1e-6


def test_infomax_has_a_gradient_where_a_prediction_is_certain():
    grad = jax.jit(jax.grad(information_maximization))
    for logits in (120 * jnp.eye(2), jnp.array([[200.0, 0.0], [200.0, 0.0]])):
        assert jnp.isfinite(grad(logits)).all()
    logits = jnp.array([[0.3, -1.0], [2.0, 0.5], [-0.4, 0.1]])
    step = 1e-2 * jnp.array([[1.0, 0.0], [0.5, -1.0], [0.0, 2.0]])
    infomax = jax.jit(information_maximization)
    up, down = (infomax(logits + sign * step) for sign in (1, -1))
    np.testing.assert_allclose(jnp.sum(grad(logits) * step), (up - down) / 2, rtol=1e-2)


def _naive_infomax(rows, sigmoid):
    """Returns InfoMax of flat rows from probabilities, in float64."""
    rows = np.asarray(rows, np.float64)
    if sigmoid:  # the sum over labels of that of two classes each
        return sum(_naive_infomax(np.stack([0 * z, z], axis=1), False) for z in rows.T)
    p = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
    mean = p.mean(axis=0)
    return (p * np.log(p)).sum(axis=1).mean() - (mean * np.log(mean)).sum()


@pytest.mark.parametrize(
    "shape, sigmoid",
    [
        ((9, 4), False),
        ((6, 5, 3), False),
        ((4, 3, 2, 2), False),
        ((9, 4), True),
        ((4, 3, 2, 2), True),
        ((9, 1), True),
    ],
)
def test_infomax_of_rows_of_any_shape(shape, sigmoid):
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=shape).astype(np.float32)
    activation = jax.nn.sigmoid if sigmoid else jax.nn.softmax
    infomax = functools.partial(information_maximization, activation=activation)
    found = jax.jit(infomax)(logits)
    assert found.dtype == jnp.float32
    rows = logits.reshape(-1, shape[-1])
    np.testing.assert_allclose(found, _naive_infomax(rows, sigmoid), rtol=1e-4)

    where = rng.uniform(size=(*shape[:-2], 1)) > 0.3  # the last of the axes broadcasts
    where = where if len(shape) > 2 else rng.uniform(size=shape[:1]) > 0.3
    mask = np.broadcast_to(where, shape[:-1])
    masked = jnp.where(mask[..., None], logits, jnp.nan)
    with jax.debug_nans(True):  # eager, where no part of it may be nan
        found = infomax(masked, where=where)
    expected = _naive_infomax(logits[mask], sigmoid)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    grad = jax.jit(jax.grad(infomax))(masked, where=where)
    assert jnp.isfinite(grad).all() and not grad[~mask].any() and grad[mask].any()


def test_infomax_of_a_binary_head():
    z = jnp.array([[9.0], [-9.0], [0.5]])
    two = jnp.concatenate([jnp.zeros_like(z), z], axis=1)
    np.testing.assert_allclose(
        information_maximization(z, activation=jax.nn.sigmoid),
        information_maximization(two),
        rtol=1e-5,
    )


@pytest.mark.parametrize("activation", [jax.nn.softmax, jax.nn.sigmoid])
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_infomax_of_a_diverged_run_is_nan(bad, activation):
    logits = jnp.eye(3).at[0, 0].set(bad)
    infomax = jax.jit(
        functools.partial(information_maximization, activation=activation)
    )
    assert jnp.isnan(infomax(logits))
    where = jnp.array([False, True, True])
    found = infomax(logits, where=where)
    expected = infomax(jnp.eye(3)[1:])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_infomax_without_rows_is_nan():
    nothing = jnp.zeros(3, bool)
    for function in (information_maximization, jax.jit(information_maximization)):
        assert jnp.isnan(function(jnp.eye(3), where=nothing))
        assert jnp.isnan(function(jnp.ones((0, 3))))


def test_infomax_of_low_precision_is_computed_in_float32():
    logits = jax.random.normal(jax.random.key(0), (99, 3), jnp.bfloat16)
    wide = information_maximization(logits.astype(jnp.float32))
    assert information_maximization(logits) == wide
    with jax.enable_x64(True):
        assert information_maximization(np.eye(3)).dtype == jnp.float64


REGRESSION = "A regression head has no classes: .*held-out source.*`proxy_a_distance`"


@pytest.mark.parametrize(
    "logits, kwargs, error, message",
    [
        (jnp.eye(3, dtype=int), {}, TypeError, "`target_logits` must be floating"),
        (
            jnp.ones(3),
            {},
            ValueError,
            r"`target_logits` must be \[batch, \.\.\., C\] with C 2 or more for "
            rf"jax.nn.softmax, got shape \(3,\)\. .*{REGRESSION}",
        ),
        (
            jnp.ones((3, 1)),
            {},
            ValueError,
            rf"\(3, 1\)\. For a binary head use `activation=.*sigmoid`, .*{REGRESSION}",
        ),
        (
            jnp.ones(3),
            {"activation": jax.nn.sigmoid},
            ValueError,
            r"with C 1 or more for jax.nn.sigmoid, got shape \(3,\)\. .* \[batch, ",
        ),
        (
            jnp.ones((3, 2)),
            {"activation": lambda y: y},
            ValueError,
            "`activation` must be jax.nn.softmax or jax.nn.sigmoid, got <function .*"
            + REGRESSION,
        ),
        (jnp.ones((0, 1)), {}, ValueError, r"got shape \(0, 1\)"),
        (jnp.eye(3), {"where": np.ones(3)}, TypeError, "`where` must be bool, got fl"),
        (
            jnp.ones((3, 4, 2)),
            {"where": np.ones(3, bool)},
            ValueError,
            r"`where` must have shape \(3, 4\).*Use `where\[:, None\]`\.$",
        ),
    ],
)
def test_what_infomax_refuses(logits, kwargs, error, message):
    with pytest.raises(error, match=message):
        information_maximization(logits, **kwargs)


RNG = np.random.default_rng(0)


@pytest.mark.slow
def test_the_same_distribution_has_distance_0_and_a_standard_error_that_is_right():
    found = [proxy_a_distance(*RNG.normal(size=(2, 60, 2))) for _ in range(60)]
    distances = np.array([f.distance for f in found])
    errors = np.array([f.standard_error for f in found])
    assert abs(distances.mean()) < 0.1
    # Held-out predictions are not quite independent: the spread is near, not equal.
    assert 0.7 < distances.std(ddof=1) / errors.mean() < 1.5


def test_a_known_error_gives_the_known_distance():
    # Normals 2 apart: the best line errs with probability Phi(-1).
    source, target = RNG.normal(size=(2, 3000, 1))
    expected = 2 * (1 - 2 * 0.5 * math.erfc(1 / math.sqrt(2)))
    found = proxy_a_distance(source, target + 2)
    assert abs(found.distance - expected) < 4 * found.standard_error < 0.15


def test_unequal_numbers_do_not_tilt_it():
    # A classifier that always says "source" would be right 19 times of 20.
    found = proxy_a_distance(RNG.normal(size=(1900, 2)), RNG.normal(size=(100, 2)))
    assert abs(found.distance) < 4 * found.standard_error


def test_trailing_axes_are_flattened_and_the_seed_repeats():
    source, target = RNG.normal(size=(2, 40, 2, 3))
    first = proxy_a_distance(source, target + 1, seed=3)
    flat = proxy_a_distance(source.reshape(40, 6), target.reshape(40, 6) + 1, seed=3)
    assert first == flat
    assert proxy_a_distance(jnp.ones((9, 2)), 5 * jnp.ones((9, 2))).distance == 2


def test_folds_go_from_2_to_the_examples_of_the_smaller_domain():
    source, target = RNG.normal(size=(4, 2)), 9 + RNG.normal(size=(6, 2))
    for folds in (2, 4):
        assert proxy_a_distance(source, target, folds=folds).distance == 2
    for folds in (1, 5):
        with pytest.raises(ValueError, match=f"from 2 to .* 4, got {folds}"):
            proxy_a_distance(source, target, folds=folds)


@pytest.mark.parametrize(
    "dtype, shown",
    [(np.complex64, "complex64"), (object, "object"), (str, "<U"), ("S1", r"\|S1")],
)
def test_features_that_are_not_real_are_refused_by_name(dtype, shown):
    real, other = np.ones((9, 2)), np.ones((9, 2)).astype(int).astype(dtype)
    rule = "` must have a real dtype and no mask, got " + shown
    with pytest.raises(TypeError, match="`source_features" + rule):
        proxy_a_distance(other, real)
    with pytest.raises(TypeError, match="`target_features" + rule):
        proxy_a_distance(real, other)


def test_a_mask_of_features_is_refused_and_not_dropped():
    masked = np.ma.masked_greater(np.arange(18.0).reshape(9, 2), 12)
    rule = "`target_features` must have a real dtype and no mask, got float64 with a "
    with pytest.raises(TypeError, match=rule):
        proxy_a_distance(np.ones((9, 2)), masked)


def test_a_number_beyond_all_floats_is_no_feature():
    with pytest.raises(TypeError, match="`target_features` must have a real dtype"):
        proxy_a_distance(np.ones((9, 2)), [[10**400, 1]] * 9)  # pyright: ignore


def test_features_may_have_any_real_dtype():
    source = jnp.arange(18).reshape(9, 2) % 2
    for dtype in (bool, np.uint8, jnp.bfloat16, np.float16):
        found = proxy_a_distance(source.astype(dtype), jnp.ones((9, 2), dtype))
        assert found == proxy_a_distance(np.asarray(source, float), np.ones((9, 2)))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: proxy_a_distance(np.ones(3), np.ones((3, 1))), "`source_features` mu"),
        (
            lambda: proxy_a_distance(np.ones((9, 0)), np.ones((9, 0))),
            r"`source_features` must be .* with a column, got shape \(9, 0\)",
        ),
        (
            lambda: proxy_a_distance(np.ones((9, 2)), np.ones((9, 2, 0))),
            r"`target_features` must be .* with a column, got shape \(9, 2, 0\)",
        ),
        (
            lambda: proxy_a_distance(np.ones((9, 2)), np.full((9, 2), np.nan)),
            "`target_features` must be finite, below 1e150, got nan",
        ),
        (
            lambda: proxy_a_distance(np.array([[1, -np.inf], [np.nan, 2]]), np.eye(2)),
            "`source_features` must be finite, below 1e150, got -inf",
        ),
        (
            lambda: proxy_a_distance(np.ones((9, 2)), np.ones((9, 3))),
            r"`target_features` must have the trailing axes .* \(9, 3\) beside \(9, 2",
        ),
        (
            lambda: proxy_a_distance(np.ones((9, 2)), np.ones((4, 2))),
            "`folds` must be a whole number from 2 to .* 4, got 5",
        ),
        (
            lambda: proxy_a_distance(np.ones((9, 2)), np.ones((9, 2)), folds=5.0),  # pyright: ignore
            "`folds` must be a whole number .* got 5.0",
        ),
        (
            lambda: proxy_a_distance(np.ones((0, 2)), np.ones((9, 2))),
            "`folds` must be .* 0, got 5",
        ),
        (
            lambda: proxy_a_distance(np.full((9, 2), 1e200), np.ones((9, 2))),
            "`source_features` must be finite, below 1e150, got ",
        ),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
