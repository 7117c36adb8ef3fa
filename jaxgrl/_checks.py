"""Checks of arguments that several functions have in common."""

import numbers
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

A = TypeVar("A")


def as_array(name: str, value: Any, convert: Callable[[Any], A] = jnp.asarray) -> A:
    """Returns ``value``, converted; raises TypeError if no array can be made of it."""
    try:
        return convert(value)
    except (TypeError, ValueError, OverflowError) as error:
        kind = type(value).__name__
        raise TypeError(f"`{name}` must be an array, got {kind}. {error}") from error


def check_size(
    name: str, value: Any, least: int, end: int = 2**31, most: str = "2**31 - 1"
) -> None:
    """Raises ValueError unless ``value`` is whole and in ``least`` to ``end - 1``."""
    if not isinstance(value, numbers.Integral) or not least <= int(value) < end:
        raise ValueError(
            f"`{name}` must be a whole number from {least} to {most}, got {value!r}."
        )


def as_floating(name: str, value: Any) -> jax.Array:
    """Returns ``value`` as an array; raises TypeError unless it is floating."""
    array = as_array(name, value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"`{name}` must be floating, got {array.dtype}.")
    return array


def check_rows(name: str, value: jax.Array, shape: Any, *kinds: Any) -> None:
    """Raises unless ``value`` has a dtype of ``kinds`` and broadcasts to ``shape``."""
    if not any(jnp.issubdtype(value.dtype, kind) for kind in kinds):
        names = " or ".join(kind.__name__.strip("_") for kind in kinds)
        raise TypeError(f"`{name}` must be {names}, got {value.dtype}.")
    sizes = zip(value.shape, shape, strict=False)
    # With as many axes: NumPy would align the last ones, not the rows.
    if value.ndim != len(shape) or any(n not in (1, m) for n, m in sizes):
        way = indexed(name, value.ndim, len(shape))
        raise ValueError(
            f"`{name}` must have shape {shape}, or 1 in place of any size, got shape "
            f"{value.shape}." + f" Use `{way}`." * (way != name)
        )


def as_mask(where: ArrayLike | None, shape: tuple[int, ...]) -> jax.Array:
    """Returns ``where``, checked and of ``shape``; True everywhere if it is None."""
    mask = jnp.ones(shape, bool) if where is None else as_array("where", where)
    check_rows("where", mask, shape, jnp.bool_)
    return jnp.broadcast_to(mask, shape)


def indexed(name: str, ndim: int, needed: int) -> str:
    """Returns the expression that gives an array of ``ndim`` axes ``needed`` axes."""
    added = [":"] * ndim + ["None"] * (needed - ndim)
    index = added if needed > ndim else ["...", *["0"] * (ndim - needed)]
    return name if ndim == needed else f"{name}[{', '.join(index)}]"
