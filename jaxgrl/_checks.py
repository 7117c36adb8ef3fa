"""Checks of arguments that several functions have in common."""

from typing import Any

import jax.numpy as jnp
from jax.typing import ArrayLike


def check_floating(name: str, value: Any) -> None:
    """Raises TypeError unless the array ``value`` is floating."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be floating, got {value.dtype}.")


def check_rows(
    name: str, value: ArrayLike, batch: int, kinds: tuple[Any, ...], kind: str
) -> None:
    """Raises unless ``value`` is ``[batch]`` and of one of the kinds of dtype."""
    value = jnp.asarray(value)
    if not any(jnp.issubdtype(value.dtype, k) for k in kinds):
        raise TypeError(f"`{name}` must have {kind} dtype, got {value.dtype}.")
    if value.shape != (batch,):
        raise ValueError(
            f"`{name}` must have shape [batch] = ({batch},), got shape {value.shape}."
        )


def checked_mask(where: ArrayLike | None, batch: int) -> Any:
    """Returns ``where`` as an array, checked; True everywhere if it is None."""
    mask = jnp.ones(batch, bool) if where is None else jnp.asarray(where)
    check_rows("where", mask, batch, (jnp.bool_,), "a bool")
    return mask
