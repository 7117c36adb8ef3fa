"""The dtype that a computation which must not lose accuracy is carried out in."""

from typing import Any

import jax.numpy as jnp


def at_least_float32(*dtypes: Any) -> Any:
    """Returns float64 if one of the dtypes is float64 or complex128, else float32."""
    # Not promote_types, which refuses bfloat16 and float32 under strict promotion.
    double = any(dtype in (jnp.float64, jnp.complex128) for dtype in dtypes)
    return jnp.dtype(jnp.float64 if double else jnp.float32)
