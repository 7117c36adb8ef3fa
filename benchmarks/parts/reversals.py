"""Gradient reversal as people write it today, under the names that tables give it.

Each is a function of ``(x, scale)`` that returns ``x`` and means to multiply its
gradient by ``-scale``. None but the first is recommended: they are what it is compared
with.
"""

import functools
from typing import Any

import jax
import optax
from jax import lax

from jaxgrl import gradient_reversal


@jax.custom_vjp
def five_lines(x: Any, scale: Any) -> Any:
    """The version that is copied most: a custom_vjp of x and scale."""
    del scale
    return x


five_lines.defvjp(lambda x, scale: (x, scale), lambda scale, g: (-scale * g, None))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def nondiff_argnums(x: Any, scale: Any) -> Any:
    """A custom_vjp that takes the scale by nondiff_argnums."""
    del scale
    return x


nondiff_argnums.defvjp(
    lambda x, scale: (x, None), lambda scale, residual, g: (-scale * g,)
)


def closure(x: Any, scale: Any) -> Any:
    """A custom_vjp made for each call, its rule closing over the scale."""

    @jax.custom_vjp
    def reverse(x):
        return x

    reverse.defvjp(lambda x: (x, None), lambda residual, g: (-scale * g,))
    return reverse(x)


@jax.custom_vjp
def whole_tree(x: Any, scale: Any) -> Any:
    """The five lines for a tree: one rule for all leaves, mapped in the backward."""
    del scale
    return x


whole_tree.defvjp(
    lambda x, scale: (x, scale),
    lambda scale, g: (jax.tree.map(lambda leaf: -scale * leaf, g), None),
)


@jax.custom_jvp
def custom_jvp(x: Any, scale: Any) -> Any:
    """The rule in forward mode, which JAX transposes."""
    del scale
    return x


@custom_jvp.defjvp
def _custom_jvp_rule(primals: Any, tangents: Any) -> Any:
    x, scale = primals
    return x, -scale * tangents[0]


def stop_gradient_trick(x: Any, scale: Any) -> Any:
    """No rule at all: arithmetic that is x by value and -scale * x by derivative."""
    return lax.stop_gradient((1 + scale) * x) - scale * x


def scale_gradient(x: Any, scale: Any) -> Any:
    """The nearest library function: it takes a Python number."""
    return optax.scale_gradient(x, -scale)


REVERSALS = {
    "jaxgrl": gradient_reversal,
    "five lines": five_lines,
    "nondiff_argnums": nondiff_argnums,
    "closure": closure,
    "whole tree": whole_tree,
    "custom_jvp": custom_jvp,
    "stop_gradient trick": stop_gradient_trick,
    "optax.scale_gradient": scale_gradient,
}
