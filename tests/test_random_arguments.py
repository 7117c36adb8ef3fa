"""Every public function with arguments that nobody should pass.

Each gives an answer, or a TypeError or ValueError that names the argument. An answer is
right if it is that of the same value as an array.
"""

import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from random_cases import cases

import jaxgrl
import jaxgrl.linen
import jaxgrl.nnx

ROWS = np.array([[1.0, -2.0, 0.5], [0.3, 0.1, -1.0], [0.2, 2.0, 1.0], [3.0, 1.0, 0.0]])
ROWS = ROWS.astype(np.float32)
DOMAINS = np.array([0, 1, 1, 0])
MASK = np.array([True, True, True, False])
PARAMS = {"w": jnp.ones(3), "v": jnp.ones(())}


def _report(params, scale, x):
    h = jaxgrl.gradient_reversal(params["w"] * x, scale)
    return jnp.sum(x * params["w"]), jnp.sum(h) * params["v"], h * params["v"]


# Each function, and arguments that it takes.
FUNCTIONS = {
    "gradient_reversal": (
        jaxgrl.gradient_reversal,
        {"x": jnp.asarray(ROWS), "scale": 0.5, "forward_mode": False},
    ),
    "gradient of gradient_reversal": (
        lambda scale: jax.grad(
            lambda x: jnp.sum(jaxgrl.gradient_reversal(x, scale)),
        )(jnp.asarray(ROWS)),
        {"scale": 0.5},
    ),
    "nnx.GradientReversal": (
        lambda x, scale: jaxgrl.nnx.GradientReversal()(x, scale),
        {"x": jnp.asarray(ROWS), "scale": 0.5},
    ),
    "linen.GradientReversal": (
        lambda x, scale: jaxgrl.linen.GradientReversal().apply({}, x, scale),
        {"x": jnp.asarray(ROWS), "scale": 0.5},
    ),
    "domain_loss": (
        jaxgrl.domain_loss,
        {
            "logits": ROWS,
            "domains": DOMAINS,
            "num_domains": 3,
            "where": MASK,
            "weights": np.ones(4, np.float32),
        },
    ),
    "domain_accuracy": (
        jaxgrl.domain_accuracy,
        {"logits": ROWS, "domains": DOMAINS, "num_domains": 3, "where": MASK},
    ),
    "domain_weights": (
        jaxgrl.domain_weights,
        {"domains": DOMAINS, "num_domains": 3, "where": MASK},
    ),
    "entropy_weights": (
        jaxgrl.entropy_weights,
        {
            "label_logits": ROWS,
            "domains": DOMAINS,
            "num_domains": 3,
            "where": MASK,
            "activation": jax.nn.softmax,
        },
    ),
    "multilinear_map": (
        jaxgrl.multilinear_map,
        {"features": ROWS, "probabilities": ROWS},
    ),
    "information_maximization": (
        jaxgrl.information_maximization,
        {"target_logits": ROWS, "where": MASK, "activation": jax.nn.softmax},
    ),
    "proxy_a_distance": (
        jaxgrl.proxy_a_distance,
        {"source_features": ROWS, "target_features": ROWS, "folds": 2, "seed": 0},
    ),
    "dann_schedule": (
        lambda **given: jaxgrl.dann_schedule(**given)(1),
        {
            "transition_steps": 10,
            "init_value": 0.0,
            "end_value": 1.0,
            "gamma": 10.0,
            "transition_begin": 0,
        },
    ),
    "dann_learning_rate": (
        lambda **given: jaxgrl.dann_learning_rate(**given)(1),
        {"init_value": 0.1, "transition_steps": 10, "alpha": 10.0, "beta": 0.75},
    ),
    "the schedule of dann_schedule": (jaxgrl.dann_schedule(10), {"step": 1}),
    "the schedule of dann_learning_rate": (
        jaxgrl.dann_learning_rate(0.1, transition_steps=10),
        {"step": 1},
    ),
    "reversal_report": (
        lambda loss: jaxgrl.reversal_report(loss, PARAMS, 1.0),
        {"loss": _report},
    ),
}

VALUES = {
    "None": None,
    "text": "text",
    "bytes": b"text",
    "object": object(),
    "type": int,
    "function": math.sin,
    "set": {1, 2},
    "empty list": [],
    "empty dict": {},
    "empty tuple": (),
    "ragged list": [[1.0], [2.0, 3.0]],
    "list of text": ["a", "b", "c", "d"],
    "list of None": [None] * 4,
    "nested dict": {"a": {"b": 1.0}},
    "nan": math.nan,
    "inf": math.inf,
    "-1": -1,
    "0": 0,
    "1": 1,
    "half": 0.5,
    "True": True,
    "complex": 1j,
    "2**63": 2**63,
    "-2**70": -(2**70),
    "10**400": 10**400,
    "longdouble": np.longdouble("1e400"),
    "array of text": np.array(["a", "b", "c", "d"]),
    "array of objects": np.array([None, 1, "a", 2.0], object),
    "date": np.datetime64("2026-01-01"),
    "scalar array": np.array(0.5, np.float32),
    "one value": np.ones(1, np.float32),
    "empty": np.zeros(0, np.float32),
    "no rows": np.zeros((0, 3), np.float32),
    "no columns": np.zeros((4, 0), np.float32),
    "five rows": np.ones((5, 3), np.float32),
    "three axes": np.ones((4, 3, 2), np.float32),
    "integers": np.array([0, 1, 1, 0]),
    "negative integers": np.array([0, -1, -5, 0]),
    "large integers": np.array([2**62, 0, 1, 2**31]),
    "unsigned": np.array([0, 2**64 - 1, 1, 2], np.uint64),
    "bools": np.array([True, False, True, False]),
    "all nan": np.full((4, 3), np.nan, np.float32),
    "all inf": np.full(4, np.inf, np.float32),
    "complex array": np.ones((4, 3), np.complex64),
    "half precision": np.ones((4, 3), np.float16),
    "bfloat16": jnp.ones((4, 3), jnp.bfloat16),
    "float8": jnp.ones((4, 3), jnp.float8_e8m0fnu),
    "key": jax.random.key(0),
    "keys": jax.random.split(jax.random.key(0), 4),
    "structure": jax.ShapeDtypeStruct((4, 3), jnp.float32),
    "masked array": np.ma.masked_array([0.0, 1.0, 2.0, 3.0], [0, 1, 0, 0]),
}

# A function that takes no such arguments raises its own error.
NO_LOSS = {key: value for key, value in VALUES.items() if not callable(value)}
CASES = [
    (function, argument, value)
    for function, (_, arguments) in FUNCTIONS.items()
    for argument in arguments
    for value in (NO_LOSS if argument == "loss" else VALUES)
]
# What has a right answer for any array has the same one for the same list.
ARRAYS = ("logits", "domains", "where", "weights", "label_logits", "target_logits")
ARRAYS += ("features", "probabilities", "source_features", "target_features", "step")


def _outcome(function, **changed):
    """Returns the answer, or None if it was refused by name."""
    call, arguments = FUNCTIONS[function]
    names = "|".join(arguments)
    try:
        # JAX itself warns that what it then refuses is not what was asked for.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call(**(arguments | changed))
    except (TypeError, ValueError) as error:
        # The one that was changed, or the one that no longer fits it.
        assert re.search(f"`({names})` must", str(error)), error
        return None


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_cannot_be_is_refused_by_name(function):
    assert _outcome(function) is not None
    for name, argument, value in CASES:
        if name != function:
            continue
        answer = _outcome(function, **{argument: VALUES[value]})
        given = VALUES[value]
        if answer is not None and given is not None and argument in ARRAYS:
            assert str(answer) == str(
                _outcome(function, **{argument: np.asarray(given)})
            )


@pytest.mark.slow
@cases(300)
@given(st.data())
def test_several_such_arguments_are_refused_by_name(data):
    function = data.draw(st.sampled_from(list(FUNCTIONS)))
    arguments = FUNCTIONS[function][1]
    names = data.draw(st.sets(st.sampled_from(list(arguments)), min_size=1))
    changed = {n: data.draw(st.sampled_from(list(NO_LOSS))) for n in sorted(names)}
    _outcome(function, **{n: VALUES[value] for n, value in changed.items()})


def test_the_number_of_cases():
    assert len(CASES) > 2300
