"""The domain loss and accuracy against plain loops in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrl import domain_accuracy, domain_loss


def _reference(logits, domains, where=None):
    """Returns loss and accuracy by loops over domains and examples, in float64."""
    logits = np.asarray(logits, np.float64)
    if logits.ndim == 1 or logits.shape[1] == 1:
        z = logits.reshape(-1)
        logits = np.stack([np.zeros_like(z), z], axis=1)
    losses, accuracies = [], []
    for d in range(logits.shape[1]):
        rows = [
            z
            for i, z in enumerate(logits)
            if domains[i] == d and (where is None or where[i])
        ]
        if rows:
            losses.append(np.mean([np.log(np.exp(z - z[d]).sum()) for z in rows]))
            accuracies.append(np.mean([np.argmax(z) == d for z in rows]))
    return np.mean(losses), np.mean(accuracies)


CASES = {
    "balanced": ([0, 0, 1, 1], (4,), None),
    "unequal": ([0, 0, 0, 0, 1], (5,), None),
    "column": ([0, 1, 1], (3, 1), None),
    "one domain": ([1, 1], (2,), None),
    "masked": ([0, 0, 1, 1, 1], (5,), [1, 0, 1, 1, 0]),
    "a domain masked out": ([0, 0, 1], (3,), [1, 1, 0]),
    "three domains": ([0, 1, 2, 2, 2, 0], (6, 3), None),
    "three domains, two present": ([0, 2, 2, 2], (4, 3), None),
    "three domains, masked": ([0, 1, 2, 2], (4, 3), [1, 1, 0, 1]),
    "two logits": ([0, 1, 1], (3, 2), None),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", CASES)
def test_against_the_reference(name, jit):
    domains, shape, where = CASES[name]
    domains = np.array(domains)
    where = None if where is None else np.array(where, bool)
    logits = np.random.default_rng(0).normal(size=shape).astype(np.float32) * 3
    maybe_jit = jax.jit if jit else lambda f: f
    loss, accuracy = _reference(logits, domains, where)
    kwargs = {} if where is None else {"where": where}
    actual = maybe_jit(domain_loss)(logits, domains, **kwargs)
    assert actual.shape == () and actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, loss, rtol=1e-5)
    actual = maybe_jit(domain_accuracy)(logits, domains, **kwargs)
    assert actual.shape == () and actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, accuracy, rtol=1e-6)


def test_repeating_the_examples_of_one_domain_changes_nothing():
    logits = np.array([-1.0, 0.5, 2.0], np.float32)
    domains = np.array([0, 0, 1])
    many = np.concatenate([logits, np.full(50, 2.0, np.float32)])
    more = np.concatenate([domains, np.ones(50, int)])
    np.testing.assert_allclose(
        domain_loss(logits, domains), domain_loss(many, more), rtol=1e-6
    )
    np.testing.assert_allclose(
        domain_accuracy(logits, domains), domain_accuracy(many, more), rtol=1e-6
    )


def test_two_logits_equal_the_sigmoid_of_their_difference():
    two = np.random.default_rng(1).normal(size=(6, 2)).astype(np.float32)
    domains = np.array([0, 1, 0, 1, 1, 1])
    one = two[:, 1] - two[:, 0]
    np.testing.assert_allclose(
        domain_loss(two, domains), domain_loss(one, domains), rtol=1e-5
    )


def test_labels_are_source_0_and_target_1():
    confident = np.array([-9.0, 9.0], np.float32)
    assert domain_loss(confident, np.array([0, 1])) < 0.01
    assert domain_loss(confident, np.array([1, 0])) > 8
    assert domain_accuracy(confident, np.array([0, 1])) == 1
    assert domain_accuracy(confident, np.array([1, 0])) == 0
    assert domain_accuracy(confident, np.array([False, True])) == 1


def test_a_constant_discriminator_has_accuracy_one_over_k():
    domains = np.array([0, 0, 0, 0, 1, 2])
    assert domain_accuracy(np.ones((6, 3), np.float32), domains) == np.float32(1 / 3)
    assert domain_accuracy(np.ones(6, np.float32), domains.clip(0, 1)) == 0.5
    np.testing.assert_allclose(
        domain_loss(np.ones((6, 3), np.float32), domains), np.log(3), rtol=1e-6
    )


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 4)])
@pytest.mark.parametrize("content", [np.nan, np.inf, 1e30])
def test_masked_rows_may_hold_anything(shape, content):
    logits = np.full(shape, content, np.float32)
    logits[0] = 0.5
    domains, where = np.array([1, 99, -1]), np.array([True, False, False])
    with jax.debug_nans(True):
        value, grad = jax.jit(jax.value_and_grad(domain_loss))(
            logits, domains, where=where
        )
    assert np.isfinite(value) and value > 0
    assert np.isfinite(grad).all() and grad[0].any() and not grad[1:].any()
    np.testing.assert_allclose(value, domain_loss(logits[:1], domains[:1]), rtol=1e-6)
    assert np.isfinite(domain_accuracy(logits, domains, where=where))


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 4)])
def test_all_masked_and_empty_batches_give_zero(shape):
    logits = np.full(shape, np.nan, np.float32)
    where = np.zeros(3, bool)
    value, grad = jax.value_and_grad(domain_loss)(logits, np.zeros(3, int), where=where)
    assert value == 0 and not grad.any()
    empty = np.zeros((0, *shape[1:]), np.float32)
    value, grad = jax.value_and_grad(domain_loss)(empty, np.zeros(0, int))
    assert value == 0 and grad.shape == empty.shape
    assert np.isnan(domain_accuracy(logits, np.zeros(3, int), where=where))
    assert np.isnan(domain_accuracy(empty, np.zeros(0, int)))


def test_logits_that_are_nan_do_not_look_confused():
    logits = np.array([np.nan, np.nan], np.float32)
    assert np.isnan(domain_accuracy(logits, np.array([0, 1])))
    assert np.isnan(domain_loss(logits, np.array([0, 1])))


def test_large_logits_do_not_overflow():
    logits = np.array([1e4, -1e4], np.float32)
    np.testing.assert_allclose(domain_loss(logits, np.array([0, 1])), 1e4)
    assert domain_loss(logits, np.array([1, 0])) == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("columns", [None, 3])
def test_low_precision_is_computed_in_float32(dtype, columns):
    n = 2000
    shape = (n,) if columns is None else (n, columns)
    logits = jnp.asarray(np.random.default_rng(0).normal(size=shape)).astype(dtype)
    domains = np.arange(n) % (columns or 2)
    value, grad = jax.value_and_grad(domain_loss)(logits, domains)
    assert value.dtype == jnp.float32 and grad.dtype == logits.dtype
    loss, accuracy = _reference(np.asarray(logits, np.float32), domains)
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    np.testing.assert_allclose(domain_accuracy(logits, domains), accuracy, rtol=1e-5)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        logits = jnp.array([1.0, 2.0], jnp.float64)
        assert domain_loss(logits, np.array([0, 1])).dtype == jnp.float64
        assert domain_accuracy(logits, np.array([0, 1])).dtype == jnp.float64


def test_the_gradient_against_finite_differences():
    with jax.enable_x64(True):
        logits = np.random.default_rng(0).normal(size=(5, 3))
        domains, where = np.array([0, 1, 1, 2, 0]), np.array([1, 1, 1, 1, 0], bool)
        grad = jax.grad(domain_loss)(logits, domains, where=where)
        for index in np.ndindex(*logits.shape):
            step = np.zeros_like(logits)
            step[index] = 1e-6
            up, down = (
                _reference(logits + d, domains, where)[0] for d in (step, -step)
            )
            np.testing.assert_allclose(grad[index], (up - down) / 2e-6, atol=1e-8)


def test_under_vmap():
    logits = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    domains = np.array([0, 0, 0, 1, 1])
    for function in (domain_loss, domain_accuracy):
        rows = jax.vmap(function, in_axes=(0, None))(logits, domains)
        singles = [function(row, domains) for row in logits]
        np.testing.assert_allclose(rows, singles, rtol=1e-6)


def test_a_traced_domain_out_of_range_gives_nan():
    logits, domains = np.zeros(3, np.float32), np.array([0, 1, 2])
    assert np.isnan(jax.jit(domain_loss)(logits, domains))
    assert np.isnan(jax.jit(domain_accuracy)(logits, domains))
    assert np.isnan(jax.jit(domain_loss)(logits, -domains))


@pytest.mark.parametrize("function", [domain_loss, domain_accuracy])
@pytest.mark.parametrize(
    "logits, domains, kwargs, error, message",
    [
        (np.zeros((2, 3, 4)), [0, 1], {}, ValueError, r"`logits` .*\(2, 3, 4\)"),
        (np.zeros(()), [0], {}, ValueError, r"`logits` .*\[batch, K\].*\(\)"),
        (np.zeros((2, 0)), [0, 1], {}, ValueError, r"`logits` .*\(2, 0\)"),
        (np.zeros(2, int), [0, 1], {}, TypeError, "`logits` must be floating, got int"),
        (np.zeros(2, complex), [0, 1], {}, TypeError, "`logits` .*complex"),
        (np.zeros(2), [0, 1, 1], {}, ValueError, r"`domains` .*\(2,\).*\(3,\)"),
        (np.zeros(2), [[0], [1]], {}, ValueError, r"`domains` .*\(2, 1\)"),
        (np.zeros(2), [0.0, 1.0], {}, TypeError, "`domains` .*integer.*float"),
        (np.zeros(2), [0, 2], {}, ValueError, "`domains` .*0 to 1 .*got 0 to 2"),
        (np.zeros((2, 3)), [-1, 2], {}, ValueError, "`domains` .*0 to 2 .*got -1 to 2"),
        (np.zeros(2), [0, 1], {"where": [1, 0]}, TypeError, "`where` .*bool.*int"),
        (np.zeros(2), [0, 1], {"where": [True]}, ValueError, r"`where` .*\(1,\)"),
    ],
)
def test_bad_input_is_refused_by_name(
    function, logits, domains, kwargs, error, message
):
    kwargs = {name: np.array(value) for name, value in kwargs.items()}
    with pytest.raises(error, match=message):
        function(jnp.asarray(logits), np.array(domains), **kwargs)
