"""Real numbers and dtypes, and the dtype of what must not lose accuracy."""

import functools
import math
from typing import Any

import jax.numpy as jnp


def at_least_float32(*dtypes: Any) -> Any:
    """Returns float64 if one of the dtypes is float64 or complex128, else float32."""
    # Not promote_types, which refuses bfloat16 and float32 under strict promotion.
    double = any(dtype in (jnp.float64, jnp.complex128) for dtype in dtypes)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


@functools.cache
def is_real(dtype: Any) -> bool:
    """Returns whether a dtype is floating, integer or bool."""
    kinds = jnp.floating, jnp.integer, jnp.bool_
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def as_float(name: str, number: Any) -> float:
    """Returns a real number as a float; raises ValueError if it does not fit."""
    try:
        value = float(number)
    except OverflowError:
        value = math.inf
    # NumPy's longdouble becomes inf without an OverflowError.
    if math.isinf(value) and value != number:
        raise ValueError(f"`{name}` must fit into a float (1.8e308 at most), got more.")
    return value
