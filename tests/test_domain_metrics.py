"""The domain weights, loss and accuracy against plain loops in NumPy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrl import domain_accuracy, domain_loss, domain_weights, entropy_weights


def _reference(logits, domains, where=None, weights=None):
    """Returns loss, accuracy and gradient of flat rows, by loops, in float64."""
    given = np.asarray(logits, np.float64)
    one = given.ndim == 1 or given.shape[1] == 1
    z = np.stack([0 * given.reshape(-1), given.reshape(-1)], 1) if one else given
    p = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    losses, accuracies, grad = [], [], np.zeros_like(z)
    rows = [
        [i for i in range(len(z)) if domains[i] == d and (where is None or where[i])]
        for d in range(z.shape[1])
    ]
    present = sum(map(bool, rows))
    for d, own in enumerate(rows):
        if own:
            w = np.ones(len(z)) if weights is None else np.float64(weights)
            losses.append(np.mean([-w[i] * np.log(p[i, d]) for i in own]))
            accuracies.append(np.mean([np.argmax(z[i]) == d for i in own]))
            for i in own:
                error = p[i] - np.eye(z.shape[1])[d]
                grad[i] = w[i] * error / (present * len(own))
    grad = (grad[:, 1] if one else grad).reshape(given.shape)
    return np.mean(losses), np.mean(accuracies), grad


def _k(logits):
    """Returns the keyword for logits ``[batch, K]``."""
    return {"num_domains": max(2, *logits.shape[1:], 0)}


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
    loss, accuracy, _ = _reference(logits, domains, where)
    kwargs = {} if where is None else {"where": where}
    for function, expected in ((domain_loss, loss), (domain_accuracy, accuracy)):
        function = functools.partial(function, **_k(logits))
        actual = (jax.jit(function) if jit else function)(logits, domains, **kwargs)
        assert actual.shape == () and actual.dtype == jnp.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-5)


# The shapes of logits and domains, and the number of domains.
LAYOUTS = {
    "a map, a domain per image": ((4, 3, 5), (4, 1, 1), 2),
    "a map with a last axis of 1": ((4, 3, 5, 1), (4, 1, 1), 2),
    "a map of two classes": ((4, 3, 5, 2), (4, 1, 1), 2),
    "a map of K classes": ((4, 3, 5, 3), (4, 1, 1), 3),
    "a domain per pixel": ((4, 3, 5), (4, 3, 5), 2),
    "a domain per line": ((4, 3, 5), (4, 3, 1), 2),
    "a domain per column": ((4, 3, 5), (1, 1, 5), 2),
    "tokens of K classes": ((4, 6, 3), (4, 1), 3),
    "tokens, a domain each": ((4, 6, 3), (4, 6), 3),
    "flat positions": ((4, 36), (4, 1), 2),
    "a column beside a column": ((4, 1), (4, 1), 2),
    "two rows, a domain each": ((4, 2), (4, 2), 2),
    "two rows of one domain": ((4, 2, 1), (4, 1), 2),
    "two classes": ((4, 2), (4,), 2),
    "as many classes as rows": ((4, 4), (4,), 4),
    "as many positions as rows": ((4, 4), (4, 1), 2),
    "one row": ((3,), (), 3),
    "one logit": ((), (), 2),
}


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_of_any_shape_equal_the_same_rows_flat(name, masked):
    shape, domains_shape, k = LAYOUTS[name]
    rng = np.random.default_rng(1)
    logits = 3 * rng.normal(size=shape).astype(np.float32)
    domains = rng.integers(k, size=domains_shape)
    rows = shape[: len(domains_shape)]
    kwargs, flat = {}, [np.broadcast_to(domains, rows).reshape(-1)]
    for key in ("where", "weights") if masked and rows else ():
        # Of size 1 along the last axis: each of them is broadcast for itself.
        given = rng.uniform(size=(*rows[:-1], 1)).astype(np.float32)
        given.flat[0] = 0.9
        kwargs[key] = given > 0.3 if key == "where" else given
        flat.append(np.broadcast_to(kwargs[key], rows).reshape(-1))
    loss, accuracy, grad = _reference(logits.reshape(-1, *shape[len(rows) :]), *flat)

    @jax.jit
    def measured(logits, domains, where=None, weights=None):
        same = {"num_domains": k, "where": where}
        return (
            jax.value_and_grad(domain_loss)(logits, domains, weights=weights, **same),
            domain_accuracy(logits, domains, **same),
        )

    actual = measured(logits, domains, **kwargs)
    expected = (loss, grad.reshape(shape)), accuracy
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7),
        actual,
        expected,
    )


def test_flat_positions_are_not_taken_for_domains():
    logits, domains = jnp.zeros((4, 36)), [0, 0, 1, 1]
    for function in (domain_loss, domain_accuracy):
        with pytest.raises(
            ValueError,
            match=r"got shape \(4, 36\) for `domains` of shape \(4,\) and "
            r"`num_domains=2`\. .* pass `num_domains=36` and `domains`\. If each logit "
            r"has a domain of its own, pass `num_domains=2`, `logits\[\.\.\., None\]` "
            r"and `domains\[:, None\]`\.$",
        ):
            function(logits, domains)
    domains = np.array(domains)
    np.testing.assert_allclose(domain_loss(logits, domains[:, None]), np.log(2))
    as_told = domain_loss(logits[..., None], domains[:, None], num_domains=2)
    np.testing.assert_allclose(as_told, np.log(2))
    np.testing.assert_allclose(
        domain_loss(logits, domains, num_domains=36), np.log(36), rtol=1e-6
    )


@pytest.mark.parametrize(
    "shape, domains_shape, k, ways",
    [
        # A domain per row of a sequence or a map; K classes or a logit per position.
        ((4, 6, 3), (4,), 3, "`num_domains=3` and `domains[:, None]`"),
        ((4, 6, 3), (4,), 2, "`num_domains=3` and `domains[:, None]`"),
        ((4, 6, 3), (4,), 2, "`logits[..., None]` and `domains[:, None, None]`"),
        ((4, 6, 3, 1), (4,), 2, "`num_domains=2` and `domains[:, None, None]`"),
        ((4, 36), (4,), 3, "`num_domains=36` and `domains`"),
        ((4, 1), (4,), 3, "`num_domains=2` and `domains`"),
        ((4,), (4,), 3, "`num_domains=4` and `domains[..., 0]`"),
        ((4, 3), (4, 1), 3, "`num_domains=3` and `domains[..., 0]`"),
        ((4,), (4, 1), 2, "`logits[..., None]` and `domains[..., 0]`"),
        # Two classes of a row, or two rows of one domain?
        ((4, 2), (4, 1), 2, "`num_domains=2` and `domains[..., 0]`"),
        ((4, 2), (4, 1), 2, "`num_domains=2`, `logits[..., None]` and `domains`"),
        ((4, 5, 2), (4, 1, 1), 2, "`num_domains=2` and `domains[..., 0]`"),
        ((2, 0), (2,), 2, "one more of size 1 or 2"),
        ((), (1,), 2, "`num_domains=2` and `domains[..., 0]`. If"),
    ],
)
@pytest.mark.parametrize("function", [domain_loss, domain_accuracy])
def test_logits_that_do_not_fit_their_domains(function, shape, domains_shape, k, ways):
    domains = jnp.zeros(domains_shape, int)
    with pytest.raises(ValueError, match=re.escape(ways)):
        function(jnp.zeros(shape), domains, num_domains=k)


def test_weights_of_rows_by_hand():
    np.testing.assert_allclose(
        domain_weights([0, 1, 1, 1]), [1 / 2, 1 / 6, 1 / 6, 1 / 6], rtol=1e-6
    )
    # A masked row has no weight, and a domain without rows no share.
    where = np.array([1, 1, 0, 0, 1], bool)
    np.testing.assert_allclose(
        domain_weights(np.array([0, 0, 1, 99, 3]), num_domains=4, where=where),
        [1 / 4, 1 / 4, 0, 0, 1 / 2],
        rtol=1e-6,
    )
    assert domain_weights([False, True]).tolist() == [0.5, 0.5]
    assert domain_weights(jnp.int32(1)).shape == ()


def test_weights_of_rows_of_any_shape():
    domains = np.random.default_rng(0).integers(3, size=(4, 1, 6))
    where = np.random.default_rng(1).uniform(size=(4, 5, 1)) > 0.4
    weights = domain_weights(domains, num_domains=3, where=where)
    assert weights.shape == (4, 5, 6) and weights.dtype == jnp.ones(()).dtype
    flat_domains, flat = (
        np.broadcast_to(a, (4, 5, 6)).reshape(-1) for a in (domains, where)
    )
    again = domain_weights(flat_domains, num_domains=3, where=flat)
    np.testing.assert_array_equal(weights.reshape(-1), again)
    for d in range(3):
        own = weights[np.broadcast_to(domains == d, weights.shape)]
        np.testing.assert_allclose(own.sum(), 1 / 3, rtol=1e-6)
    assert not weights[~np.broadcast_to(where, weights.shape)].any()


def test_one_answer_for_a_batch_without_rows():
    nothing = [
        (jnp.zeros((0, 3)), jnp.zeros(0, int), None),
        (jnp.full((4, 3), jnp.nan), jnp.full(4, 99), jnp.zeros(4, bool)),
    ]
    for jit in (lambda f: f, jax.jit):
        for logits, domains, where in nothing:
            kwargs = {"num_domains": 3}

            def call(f, *args, kwargs=kwargs, where=where, jit=jit):
                return jit(functools.partial(f, **kwargs))(*args, where=where)

            value, grad = call(jax.value_and_grad(domain_loss), logits, domains)
            assert value == 0 and grad.shape == logits.shape and not grad.any()
            assert jnp.isnan(call(domain_accuracy, logits, domains))
            for weights in (
                call(domain_weights, domains),
                call(entropy_weights, logits, domains),
            ):
                assert weights.tolist() == [0] * len(domains)


def test_balanced_forms_of_other_losses():
    """A hinge, a squared error and soft labels, against loops over the domains."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=9).astype(np.float32)
    domains, where = np.array([0, 0, 1, 0, 0, 1, 0, 0, 1]), np.arange(9) != 4
    soft = np.where(domains == 1, 0.9, 0.1).astype(np.float32)
    signs = 2.0 * domains - 1
    weights = domain_weights(domains, where=where).astype(jnp.float32)
    log_p, log_q = jax.nn.log_sigmoid(scores), jax.nn.log_sigmoid(-scores)
    losses = {
        "hinge": np.maximum(0, 1 - signs * scores),
        "squared error": (scores - domains) ** 2,
        "soft labels": np.asarray(-soft * log_p - (1 - soft) * log_q),
    }
    for loss in losses.values():
        means = [np.mean(loss[where & (domains == d)]) for d in (0, 1)]
        np.testing.assert_allclose(
            jnp.sum(weights * loss.astype(np.float32)), np.mean(means), rtol=1e-5
        )


def test_micro_batches_add_up_to_the_batch():
    logits = jnp.array([-1, 2, 0.5, 1, -2, 3, 1, 0.5])
    domains = jnp.array([0, 0, 0, 1, 0, 1, 1, 1])
    halves = [slice(0, 4), slice(4, 8)]
    averaged = np.mean([domain_loss(logits[half], domains[half]) for half in halves])
    np.testing.assert_allclose(averaged, 0.464, atol=5e-4)  # not what is wanted
    weights = domain_weights(domains)

    def part(logits, half):
        signs = jnp.where(domains[half] == 1, 1.0, -1.0)
        return jnp.sum(weights[half] * jax.nn.softplus(-signs * logits[half]))

    loss, grad = jax.jit(jax.value_and_grad(domain_loss))(logits, domains)
    np.testing.assert_allclose(loss, 0.586, atol=5e-4)
    np.testing.assert_allclose(sum(part(logits, h) for h in halves), loss, rtol=1e-6)
    parts = sum(jax.grad(part)(logits, h) for h in halves)
    np.testing.assert_allclose(parts, grad, rtol=1e-6)


def test_gradients_per_example_add_up_to_that_of_the_batch():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 3)).astype(np.float32)
    w = rng.normal(size=(3, 4)).astype(np.float32)
    domains, k = np.array([0, 0, 3, 1, 0, 1, 0]), {"num_domains": 4}
    whole = jax.jit(jax.grad(lambda w: domain_loss(x @ w, domains, **k)))(w)

    def of_row(w, x, domain, weight):
        return -weight * jax.nn.log_softmax(x @ w)[domain]

    rows = jax.jit(jax.vmap(jax.grad(of_row), (None, 0, 0, 0)))
    weights = domain_weights(domains, **k).astype(jnp.float32)
    grads = rows(w, x, domains, weights)
    np.testing.assert_allclose(grads.sum(axis=0), whole, rtol=1e-5, atol=1e-7)

    # The same by the loss of each row alone, which the counts of all of them balance.
    def alone(x, domain):
        loss = functools.partial(domain_loss, axis_name="batch", **k)
        return jax.grad(lambda w: loss(x @ w, domain))(w)

    grads = jax.jit(jax.vmap(alone, axis_name="batch"))(x, domains)
    np.testing.assert_allclose(grads.mean(axis=0), whole, rtol=1e-5, atol=1e-7)


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
    undecided = np.zeros((1, 2), np.float32)  # is the first, with one logit or two
    assert domain_accuracy(undecided, np.array([0])) == 1
    assert domain_accuracy(undecided[:, 0], np.array([0])) == 1


def test_a_constant_discriminator_has_accuracy_one_over_k():
    domains = np.array([0, 0, 0, 0, 1, 2])
    accuracy = domain_accuracy(np.ones((6, 3), np.float32), domains, num_domains=3)
    np.testing.assert_allclose(accuracy, 1 / 3, rtol=1e-6)
    assert domain_accuracy(np.ones(6, np.float32), domains.clip(0, 1)) == 0.5
    np.testing.assert_allclose(
        domain_loss(np.ones((6, 3), np.float32), domains, num_domains=3),
        np.log(3),
        rtol=1e-6,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 4)])
@pytest.mark.parametrize("content", [np.nan, np.inf, 1e30])
def test_masked_rows_may_hold_anything(shape, content, dtype):
    logits = jnp.full(shape, content, dtype).at[0].set(0.5)
    domains, where = np.array([1, 99, -1]), np.array([True, False, False])
    weights = jnp.array([1.0, content, content])
    loss = functools.partial(domain_loss, **_k(logits))
    with jax.debug_nans(True):  # eager, where even a cast of nan raises, and in jit
        given = {"where": where, "weights": weights}
        value = loss(logits, domains, **given)
        grad = jax.jit(jax.grad(loss))(logits, domains, **given)
        accuracy = domain_accuracy(logits, domains, where=where, **_k(logits))
    assert np.isfinite(value) and value > 0 and np.isfinite(accuracy)
    assert np.isfinite(grad).all() and grad[0].any() and not grad[1:].any()
    np.testing.assert_allclose(value, loss(logits[:1], domains[:1]), rtol=1e-6)


def test_logits_that_are_nan_do_not_look_confused():
    logits = np.array([np.nan, np.nan], np.float32)
    assert np.isnan(domain_accuracy(logits, np.array([0, 1])))
    assert np.isnan(domain_loss(logits, np.array([0, 1])))
    one_of_k = np.array([[np.nan, 0], [0, 1]], np.float32)
    assert np.isnan(domain_accuracy(one_of_k, np.array([0, 1])))
    assert np.isnan(domain_loss(one_of_k, np.array([0, 1])))


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
    k = _k(logits)
    loss = functools.partial(domain_loss, **k)
    value, grad = jax.jit(jax.value_and_grad(loss))(logits, domains)
    assert value.dtype == jnp.float32 and grad.dtype == logits.dtype
    loss, accuracy, _ = _reference(np.asarray(logits, np.float32), domains)
    np.testing.assert_allclose(value, loss, rtol=1e-5)
    np.testing.assert_allclose(
        domain_accuracy(logits, domains, **k), accuracy, rtol=1e-5
    )


def test_float64_stays_float64():
    with jax.enable_x64(True):
        logits = jnp.array([1.0, 2.0], jnp.float64)
        assert domain_loss(logits, np.array([0, 1])).dtype == jnp.float64
        assert domain_accuracy(logits, np.array([0, 1])).dtype == jnp.float64
        weights = domain_weights(np.array([0, 1, 1, 1]))
        assert weights.dtype == jnp.float64 and weights[1] == 1 / 6


def test_the_gradient_against_finite_differences():
    with jax.enable_x64(True):
        logits = np.random.default_rng(0).normal(size=(5, 3))
        domains, where = np.array([0, 1, 1, 2, 0]), np.array([1, 1, 1, 1, 0], bool)
        loss = functools.partial(domain_loss, num_domains=3)
        grad = jax.jit(jax.grad(loss))(logits, domains, where=where)
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
    for function in (domain_loss, domain_accuracy):
        assert np.isnan(jax.jit(function)(logits, domains))
        assert np.isnan(jax.jit(function)(logits, -domains))
        where = domains != 2
        assert np.isfinite(jax.jit(function)(logits, domains, where=where))
    for bad in (domains, -domains):
        weights = jax.jit(domain_weights)(bad)
        assert np.isnan(weights).tolist() == [not 0 <= d <= 1 for d in bad]


def test_a_constant_domain_may_be_masked_by_a_traced_mask():
    def weights(where):
        return domain_weights(np.array([0, 9, 1]), where=where)

    assert jax.jit(weights)(np.array([True, False, True])).tolist() == [0.5, 0, 0.5]
    assert np.isnan(jax.jit(weights)(np.ones(3, bool))).tolist() == [False, True, False]


def test_a_missing_domain_divides_nothing_by_zero():
    with jax.debug_infs(True):
        assert domain_weights(jnp.array([2, 2]), num_domains=4).tolist() == [0.5, 0.5]
        nothing = domain_weights(jnp.array([0]), where=jnp.array([False]))
    assert nothing == 0


def test_a_domain_is_known_inside_jit_where_it_is_a_constant():
    def loss(logits):
        return domain_loss(logits, np.array([0, 2]))

    with pytest.raises(ValueError, match=r"`domains` must lie in 0 to 1 .* 0 to 2"):
        jax.jit(loss)(np.zeros(2, np.float32))


@pytest.mark.parametrize("function", [domain_loss, domain_accuracy])
@pytest.mark.parametrize(
    "logits, domains, kwargs, error, message",
    [
        (np.zeros(2, int), [0, 1], {}, TypeError, "`logits` must be floating, got int"),
        (np.zeros(2, complex), [0, 1], {}, TypeError, "`logits` .*complex"),
        (
            np.zeros(2),
            [0, 1, 1],
            {},
            ValueError,
            r"`domains` must have shape \(2,\), or 1 in place of any size, got shape "
            r"\(3,\)\.$",
        ),
        (np.zeros((2, 5)), [[0], [1], [1]], {}, ValueError, r"`domains` .*\(3, 1\)\.$"),
        (np.zeros(2), [0.0, 1.0], {}, TypeError, "`domains` .*integer or bool.*float"),
        (np.zeros(2), [0, 2], {}, ValueError, "`domains` .*0 to 1 .*got 0 to 2"),
        (np.zeros(2), [0, -1], {}, ValueError, "`domains` .*0 to 1 .*got -1 to 0"),
        (np.zeros(4), [0, 1], {}, ValueError, r"`domains` .*\(4,\), .*\(2,\)\.$"),
        (np.zeros(2), [0, 1], {"where": [1, 0]}, TypeError, "`where` .*bool.*int"),
        (np.zeros(2), [0, 1], {"where": [True] * 3}, ValueError, r"`where` .*\(3,\)"),
        (
            np.zeros((2, 3)),
            [[0], [1]],
            {"where": [True, False]},
            ValueError,
            r"`where` .*\(2, 3\).*\(2,\)\. Use `where\[:, None\]`\.$",
        ),
        (
            np.zeros(2),
            [0, 1],
            {"where": [[True], [False]]},
            ValueError,
            r"`where` .*\(2, 1\)\. Use `where\[\.\.\., 0\]`\.$",
        ),
        (np.zeros(2), [0, 1], {"num_domains": 1}, ValueError, "`num_domains` .* got 1"),
        (np.zeros(2), [0, 1], {"num_domains": 2.0}, ValueError, "`num_domains` .* 2.0"),
    ],
)
def test_bad_input_is_refused_by_name(
    function, logits, domains, kwargs, error, message
):
    kwargs = {n: np.array(v) if n == "where" else v for n, v in kwargs.items()}
    with pytest.raises(error, match=message):
        function(jnp.asarray(logits), np.array(domains), **kwargs)


@pytest.mark.parametrize(
    "domains, kwargs, error, message",
    [
        ([0, 2], {}, ValueError, "`domains` must lie in 0 to 1 .*got 0 to 2"),
        ([0.0, 1.0], {}, TypeError, "`domains` must be integer or bool, got float"),
        ([0, 1], {"num_domains": 1}, ValueError, "`num_domains` .* got 1"),
        ([0, 1], {"where": np.ones((2, 3), bool)}, ValueError, r"`where` .*\(2, 3\)"),
        ([[0], [1]], {"where": np.ones(2, bool)}, ValueError, r"`where\[:, None\]`"),
    ],
)
def test_weights_refuse_by_name(domains, kwargs, error, message):
    with pytest.raises(error, match=message):
        domain_weights(np.array(domains), **kwargs)
