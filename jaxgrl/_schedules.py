"""The two schedules of the DANN papers, as callables from step to value."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from ._checks import as_array
from ._dtypes import as_float, at_least_float32, is_real


def dann_schedule(
    transition_steps: int,
    *,
    init_value: ArrayLike = 0.0,
    end_value: ArrayLike = 1.0,
    gamma: float = 10.0,
    transition_begin: int = 0,
) -> optax.Schedule:
    """Returns the schedule of the reversal in DANN, which rises from 0 to 1.

    ``init_value + (end_value - init_value) * (2 / (1 + exp(-gamma * p)) - 1)``, with
    ``p = clip((step - transition_begin) / transition_steps, 0, 1)``.

    Pass the value to the reversal layer only. If it weights the domain loss too, the
    features get its square, and the discriminator learns nothing while it is small.
    Source: Ganin and Lempitsky, 2015, https://proceedings.mlr.press/v37/ganin15.html

    Args:
      transition_steps: Steps from start to end, usually the whole training; 1 or more.
      init_value: Value at the start, a number or a scalar array, which may be traced.
      end_value: Value that the end approaches, likewise.
      gamma: Steepness, positive; 10 in the paper, which ends at 0.99991 of the way.
      transition_begin: Step at which the transition starts, 0 or more.

    Returns:
      An ``optax.Schedule``. It maps integers of any shape, traced or not, to scales of
      the same shape, float32 or wider.

    Raises:
      TypeError, ValueError: If an argument is no number, or breaks its rule.
    """
    steps = _number("transition_steps", transition_steps, "1 or more", lambda v: v >= 1)
    init = _value("init_value", init_value)
    end = _value("end_value", end_value)
    steepness = _number("gamma", gamma, "positive", lambda v: v > 0)
    begin = _number("transition_begin", transition_begin, "0 or more", lambda v: v >= 0)

    def schedule(step: ArrayLike) -> jax.Array:
        # tanh(z / 2) is 2 / (1 + exp(-z)) - 1, and exactly 0 at 0.
        progress = jnp.tanh(steepness * _progress(step, begin, steps) / 2)
        return init + (end - init) * progress

    return schedule


def dann_learning_rate(
    init_value: ArrayLike,
    *,
    transition_steps: int,
    alpha: float = 10.0,
    beta: float = 0.75,
) -> optax.Schedule:
    """Returns the learning rate schedule of DANN, which decays from ``init_value``.

    ``init_value / (1 + alpha * clip(step / transition_steps, 0, 1)) ** beta``.
    Source: as for ``dann_schedule``.

    Args:
      init_value: Rate at the start, as in ``dann_schedule``; 0.01 in the paper.
      transition_steps: As in ``dann_schedule``.
      alpha: How far it decays, 0 or more; 10 in the paper.
      beta: Exponent of the decay, 0 or more; 0.75 in the paper.

    Returns:
      An ``optax.Schedule``, as ``dann_schedule`` does.

    Raises:
      TypeError, ValueError: As in ``dann_schedule``.
    """
    init = _value("init_value", init_value)
    steps = _number("transition_steps", transition_steps, "1 or more", lambda v: v >= 1)
    slope = _number("alpha", alpha, "0 or more", lambda v: v >= 0)
    exponent = _number("beta", beta, "0 or more", lambda v: v >= 0)

    def schedule(step: ArrayLike) -> jax.Array:
        return init / (1 + slope * _progress(step, 0.0, steps)) ** exponent

    return schedule


def _progress(step: ArrayLike, begin: float, steps: float) -> jax.Array:
    """Returns the fraction of the transition that is done, clamped to [0, 1]."""
    step = as_array("step", step)
    if not is_real(step.dtype):
        raise TypeError(f"`step` must be real, got {step.dtype}.")
    step = step.astype(at_least_float32(step.dtype))
    return jnp.clip((step - begin) / steps, 0.0, 1.0)


def _number(name: str, value: Any, rule: str, holds: Callable[..., bool]) -> float:
    """Returns ``value`` as a float, checked."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    number = as_float(name, value)
    if not (math.isfinite(number) and holds(number)):
        raise ValueError(f"`{name}` must be finite and {rule}, got {value!r}.")
    return number


def _value(name: str, value: Any) -> Any:
    """Returns ``value``, checked: a float, or a scalar jax.Array, perhaps traced."""
    if isinstance(value, np.ndarray) and not value.ndim:
        value = value.item()
    if not isinstance(value, jax.Array):
        return _number(name, value, "real", lambda v: True)
    if value.ndim or not is_real(value.dtype):
        got = f"{value.dtype}{list(value.shape)}"
        raise TypeError(f"`{name}` must be a real number or a scalar array, got {got}.")
    if not isinstance(value, Tracer):
        _number(name, value.item(), "real", lambda v: True)
    return value.astype(at_least_float32(value.dtype))
