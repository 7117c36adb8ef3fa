"""The log probabilities that a classifier's logits stand for, and their entropy."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def is_activation(value: Any) -> bool:
    """Returns whether ``value`` is one of the two that stand for probabilities."""
    sigmoid: Any = jax.nn.sigmoid  # copy.deepcopy makes another object of it
    state = value.__getstate__() if type(value) is type(sigmoid) else None
    copied = isinstance(state, dict) and state.get("fun") is sigmoid.__wrapped__
    return copied or value is jax.nn.softmax or value is sigmoid


def check_classes(
    name: str, logits: Any, activation: Any, otherwise: str, least_ndim: int = 2
) -> None:
    """Raises ValueError unless ``logits`` fit; ``otherwise`` is for other heads."""
    if not is_activation(activation):
        raise ValueError(
            "`activation` must be jax.nn.softmax or jax.nn.sigmoid, got "
            f"{activation!r}. {otherwise}"
        )
    kind, least = ("softmax", 2) if activation is jax.nn.softmax else ("sigmoid", 1)
    shape: Any = getattr(logits, "shape", ())
    if len(shape) < least_ndim or shape[-1] < least:
        raise ValueError(
            f"`{name}` must be [batch, ..., C] with C {least} or more for "
            f"jax.nn.{kind}, got shape {jax.tree.map(jnp.shape, logits)}. For a binary "
            f"head use `activation=jax.nn.sigmoid`, shape [batch, ..., 1]. {otherwise}"
        )


def log_probabilities(logits: jax.Array, activation: Callable[..., Any]) -> jax.Array:
    """Returns the log probabilities ``[..., groups, classes]`` of ``[..., C]``."""
    # A softmax is one group of C classes, a sigmoid C independent groups of two.
    if activation is jax.nn.softmax:
        return jax.nn.log_softmax(logits)[..., None, :]
    return jax.nn.log_sigmoid(jnp.stack([-logits, logits], axis=-1))


def entropy(log_p: jax.Array) -> jax.Array:
    """Returns the entropy in nats, summed over independent groups."""
    p = jnp.exp(log_p)
    # A probability of 0 adds nothing, though its logarithm is infinite.
    return -jnp.sum(p * jnp.where(p == 0, 0, log_p), axis=(-2, -1))
