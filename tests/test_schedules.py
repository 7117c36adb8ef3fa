"""The schedules against their formulas, and inside what optax makes of schedules."""

import fractions
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgrl import dann_learning_rate, dann_schedule


def _scale(p, gamma=10.0, init=0.0, end=1.0):
    return init + (end - init) * (2 / (1 + np.exp(-gamma * p)) - 1)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"gamma": 5.0},
        {"init_value": 0.2, "end_value": 3.0},
        {"init_value": 1.0, "end_value": 0.0},
        {"transition_begin": 30},
    ],
    ids=str,
)
def test_dann_schedule_follows_the_formula(kwargs, jit):
    schedule = dann_schedule(100, **kwargs)
    schedule = jax.jit(schedule) if jit else schedule
    begin = kwargs.get("transition_begin", 0)
    formula = {
        "gamma": kwargs.get("gamma", 10.0),
        "init": kwargs.get("init_value", 0.0),
        "end": kwargs.get("end_value", 1.0),
    }
    for step in (0, 1, 29, 30, 31, 50, 99, 100, 130, 131, 1000):
        p = np.clip((step - begin) / 100, 0, 1)
        np.testing.assert_allclose(schedule(step), _scale(p, **formula), atol=3e-7)


def test_dann_schedule_at_its_ends():
    schedule = dann_schedule(100)
    assert schedule(0) == 0 and schedule(-7) == 0  # exactly, and clamped
    assert dann_schedule(100, init_value=0.3, transition_begin=5)(5) == np.float32(0.3)
    assert schedule(100) == schedule(10**6)
    assert round(float(schedule(100)), 5) == 0.99991


def test_dann_learning_rate_follows_the_formula():
    schedule = dann_learning_rate(0.01, transition_steps=100)
    for step in (-5, 0, 1, 50, 100, 200):
        p = np.clip(step / 100, 0, 1)
        np.testing.assert_allclose(schedule(step), 0.01 / (1 + 10 * p) ** 0.75, 1e-6)
    assert schedule(0) == np.float32(0.01)
    other = dann_learning_rate(1.0, transition_steps=10, alpha=3.0, beta=2.0)
    np.testing.assert_allclose(other(10), 1 / 16, rtol=1e-6)


@pytest.mark.parametrize(
    "schedule", [dann_schedule(9), dann_learning_rate(0.1, transition_steps=9)]
)
def test_steps_may_be_traced_mapped_and_of_any_integer_type(schedule):
    steps = jnp.arange(-2, 12)
    values = schedule(steps)
    assert values.shape == steps.shape and values.dtype == jnp.float32
    np.testing.assert_array_equal(jax.vmap(schedule)(steps), values)
    np.testing.assert_allclose(jax.jit(schedule)(steps), values, rtol=1e-6)
    scanned = jax.lax.scan(lambda c, step: (c, schedule(step)), None, steps)[1]
    np.testing.assert_allclose(scanned, values, rtol=1e-6)
    for step in (3, np.int64(3), np.uint8(3), jnp.int32(3), jnp.uint32(3), 3.0):
        np.testing.assert_allclose(schedule(step), values[5], rtol=1e-6)
        assert schedule(step).shape == ()
    with jax.enable_x64(True):
        assert schedule(jnp.array(3, jnp.int64)).dtype == jnp.float32


def test_unsigned_steps_before_the_transition_do_not_wrap_round():
    assert dann_schedule(10, transition_begin=5)(jnp.uint32(1)) == 0


def test_one_program_for_a_sweep_over_the_largest_scale():
    ends = jnp.array([0.1, 1.0, 3.0], jnp.float32)
    values = jax.jit(jax.vmap(lambda end: dann_schedule(10, end_value=end)(10)))(ends)
    np.testing.assert_allclose(values, np.asarray(ends) * np.tanh(5), rtol=1e-6)


def test_join_schedules():
    joined = optax.join_schedules(
        [dann_schedule(10), dann_schedule(10, init_value=1.0, end_value=0.0)], [10]
    )
    assert joined(0) == 0 and joined(10) == 1
    np.testing.assert_allclose(joined(5), _scale(0.5), atol=1e-6)
    np.testing.assert_allclose(joined(25), 1 - np.tanh(5), atol=1e-6)


@pytest.mark.parametrize("inject", [False, True], ids=["sgd", "inject_hyperparams"])
def test_as_the_learning_rate_of_an_optimizer(inject):
    schedule = dann_learning_rate(0.5, transition_steps=4)
    optimizer = (
        optax.inject_hyperparams(optax.sgd)(learning_rate=schedule)
        if inject
        else optax.sgd(learning_rate=schedule)
    )
    params = jnp.ones(2, jnp.float32)
    state = optimizer.init(params)
    for step in range(6):
        updates, state = jax.jit(optimizer.update)(params, state)
        np.testing.assert_allclose(updates, -schedule(step) * params, rtol=1e-6)


def test_all_but_the_first_argument_are_keywords():
    with pytest.raises(TypeError, match="takes 1 positional argument but 2 were given"):
        dann_schedule(1000, 0.3)
    with pytest.raises(TypeError, match="takes 1 positional argument but 2"):
        dann_learning_rate(0.01, 1000)
    for schedule in (dann_schedule, dann_learning_rate):
        first, *others = inspect.signature(schedule).parameters.values()
        assert first.kind is first.POSITIONAL_OR_KEYWORD
        assert {p.kind for p in others} == {inspect.Parameter.KEYWORD_ONLY}


def test_the_edges_of_what_is_allowed():
    ends = {
        (alpha, beta): float(
            dann_learning_rate(0.1, transition_steps=9, alpha=alpha, beta=beta)(9)
        )
        for alpha, beta in ((0, 0.75), (0.5, 1), (10, 0), (0, 0))
    }
    np.testing.assert_allclose(list(ends.values()), [0.1, 0.1 / 1.5, 0.1, 0.1], 1e-6)
    one_step = dann_schedule(1, gamma=1e-3, init_value=-1.0, transition_begin=0)
    assert one_step(0) == -1 and -1 < one_step(1) < -0.99
    assert dann_learning_rate(-0.1, transition_steps=1, alpha=1, beta=1)(1) == -0.05


ARRAYS = {
    "Fraction": fractions.Fraction(1, 4),
    "float64": np.float64(0.25),
    "float16": np.float16(0.25),
    "0-d NumPy": np.array(0.25),
    "0-d bfloat16": jnp.array(0.25, jnp.bfloat16),
    "0-d integer": jnp.array(0),
}


@pytest.mark.parametrize("value", ARRAYS.values(), ids=ARRAYS)
def test_values_may_be_any_real_scalar(value):
    for schedule in (
        dann_schedule(
            np.int64(10), init_value=value, end_value=value, gamma=float(value) + 1
        ),
        dann_learning_rate(value, transition_steps=np.uint8(10), beta=np.array(0)[()]),
    ):
        got = schedule(7)
        assert got == float(value) and got.dtype == jnp.float32


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: dann_schedule(10**400),
            ValueError,
            "`transition_steps` must fit into a float .*, got more",
        ),
        (
            lambda: dann_schedule(9, end_value=-(10**5000)),  # too long to be printed
            ValueError,
            "`end_value` must fit into a float",
        ),
        (
            lambda: dann_schedule(9, gamma=fractions.Fraction(10**400)),
            ValueError,
            "`gamma` must fit into a float",
        ),
        (
            lambda: dann_learning_rate(np.longdouble("1e400"), transition_steps=9),
            ValueError,
            "`init_value` must fit into a float",
        ),
        (
            lambda: dann_schedule(9, init_value=jnp.ones(3)),
            TypeError,
            r"`init_value` must be a real number or a scalar array, got float\d\d\[3\]",
        ),
        (
            lambda: dann_schedule(9, end_value=jnp.array(1j)),
            TypeError,
            r"`end_value` must be a real number or a scalar array, got complex",
        ),
        (
            lambda: dann_schedule(9, end_value=np.array(np.nan)),
            ValueError,
            "`end_value` must be finite and real, got nan",
        ),
        (
            lambda: dann_schedule(9, end_value=jnp.array(jnp.nan)),
            ValueError,
            "`end_value` must be finite and real, got nan",
        ),
        (
            lambda: dann_learning_rate(jnp.array(jnp.inf), transition_steps=9),
            ValueError,
            "`init_value` must be finite and real, got inf",
        ),
        (lambda: dann_schedule(9, end_value=np.ones(3)), TypeError, "got array"),
        (lambda: dann_schedule(0), ValueError, "`transition_steps` .*1 or more, got 0"),
        (lambda: dann_schedule(-5), ValueError, "`transition_steps` .*got -5"),
        (lambda: dann_schedule("9"), TypeError, "`transition_steps` .*got '9'"),
        (lambda: dann_schedule(9, gamma=0), ValueError, "`gamma` .*positive, got 0"),
        (lambda: dann_schedule(9, gamma=np.inf), ValueError, "`gamma` .*finite"),
        (lambda: dann_schedule(9, end_value=np.nan), ValueError, "`end_value` .*nan"),
        (lambda: dann_schedule(9, end_value=1j), TypeError, "`end_value` .*1j"),
        (lambda: dann_schedule(9, init_value=None), TypeError, "`init_value` .*None"),
        (
            lambda: dann_schedule(9, transition_begin=-1),
            ValueError,
            "`transition_begin` .*0 or more, got -1",
        ),
        (
            lambda: dann_learning_rate(9, transition_steps=0.1),
            ValueError,
            "`transition_steps` .*got 0.1",
        ),
        (
            lambda: dann_learning_rate(None, transition_steps=9),
            TypeError,
            "`init_value` .*got None",
        ),
        (
            lambda: dann_learning_rate(1.0, transition_steps=0),
            ValueError,
            "`transition_steps` .*got 0",
        ),
        (
            lambda: dann_learning_rate(1.0, transition_steps=9, alpha=-1),
            ValueError,
            "`alpha` .*got -1",
        ),
        (
            lambda: dann_learning_rate(1.0, transition_steps=9, beta=-1),
            ValueError,
            "`beta` .*got -1",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()
