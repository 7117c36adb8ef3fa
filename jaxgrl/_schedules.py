"""The two schedules of the DANN papers, as callables from step to value."""

import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from ._dtypes import as_float, at_least_float32, is_real


def dann_schedule(
    transition_steps: int,
    *,
    init_value: ArrayLike = 0.0,
    end_value: ArrayLike = 1.0,
    gamma: float = 10.0,
    transition_begin: int = 0,
) -> optax.Schedule:
    """Returns the schedule by which DANN turns the reversal on, from 0 to 1.

    With ``p = clip((step - transition_begin) / transition_steps, 0, 1)``::

        scale = init_value + (end_value - init_value) * (2 / (1 + exp(-gamma * p)) - 1)

    It is exactly ``init_value`` up to ``transition_begin``. At the end it stops just
    short of ``end_value``: with ``gamma=10`` at 0.99991 of the way.

    The value belongs in the gradient reversal layer and nowhere else. Weighting the
    domain loss with it as well gives the features its square and starves the domain
    discriminator while it is small.

    Args:
      transition_steps: The number of steps from start to end, as a rule all the steps
        of the training. 1 or more.
      init_value: The value at the start. A number, or a scalar array, which may be
        traced.
      end_value: The value that the end approaches. A number, or a scalar array, which
        may be traced.
      gamma: The steepness, positive; 10 in the paper.
      transition_begin: The step at which the transition starts, 0 or more.

    Returns:
      An ``optax.Schedule``: a function from the step, an integer or an array of
      integers, concrete or traced, to the scale: an array of the shape of the step,
      float32 or wider.

    Raises:
      ValueError: If an argument breaks its rule.
      TypeError: If a number is expected and something else is given, or if more than
        ``transition_steps`` is given by position.

    Example:
      >>> import jaxgrl
      >>> schedule = jaxgrl.dann_schedule(transition_steps=1000)
      >>> for step in (0, 100, 500, 1000):
      ...     print(step, f"{schedule(step):.5f}")
      0 0.00000
      100 0.46212
      500 0.98661
      1000 0.99991

    References:
      Ganin and Lempitsky, Unsupervised Domain Adaptation by Backpropagation, ICML 2015,
      https://proceedings.mlr.press/v37/ganin15.html
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

    With ``p = clip(step / transition_steps, 0, 1)``::

        learning_rate = init_value / (1 + alpha * p) ** beta

    It is exactly ``init_value`` at step 0 and, by default, 0.166 of it at the end.

    Args:
      init_value: The learning rate at the start, 0.01 in the paper. A number, or a
        scalar array, which may be traced.
      transition_steps: The number of steps from start to end, as a rule all the steps
        of the training. 1 or more.
      alpha: How far it decays, 0 or more; 10 in the paper.
      beta: The exponent of the decay, 0 or more; 0.75 in the paper.

    Returns:
      An ``optax.Schedule``: a function from the step, an integer or an array of
      integers, concrete or traced, to the learning rate: an array of the shape of the
      step, float32 or wider.

    Raises:
      ValueError: If an argument breaks its rule.
      TypeError: If a number is expected and something else is given, or if more than
        ``init_value`` is given by position.

    Example:
      >>> import jaxgrl, optax
      >>> schedule = jaxgrl.dann_learning_rate(0.01, transition_steps=1000)
      >>> for step in (0, 500, 1000):
      ...     print(step, f"{schedule(step):.5f}")
      0 0.01000
      500 0.00261
      1000 0.00166
      >>> optimizer = optax.sgd(schedule, momentum=0.9)

    References:
      Ganin and Lempitsky, Unsupervised Domain Adaptation by Backpropagation, ICML 2015,
      https://proceedings.mlr.press/v37/ganin15.html
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
    step = jnp.asarray(step)
    step = step.astype(at_least_float32(step.dtype))
    return jnp.clip((step - begin) / steps, 0.0, 1.0)


def _number(
    name: str, value: object, rule: str, holds: Callable[[float], bool]
) -> float:
    """Returns ``value`` as a float, checked."""
    if not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number, got {value!r}.")
    number = as_float(name, value)
    if not (math.isfinite(number) and holds(number)):
        raise ValueError(f"`{name}` must be finite and {rule}, got {value!r}.")
    return number


def _value(name: str, value: Any) -> Any:
    """Returns ``value``, checked, as a float or a scalar jax.Array."""
    if isinstance(value, np.ndarray) and not value.ndim:
        value = value.item()
    if not isinstance(value, jax.Array):
        return _number(name, value, "real", lambda v: True)
    # It may be traced: a sweep over the largest scale is one program.
    if value.ndim or not is_real(value.dtype):
        raise TypeError(
            f"`{name}` must be a real number or a scalar array, got "
            f"{value.dtype}{list(value.shape)}."
        )
    return value.astype(at_least_float32(value.dtype))
