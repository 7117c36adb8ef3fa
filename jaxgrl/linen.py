"""Gradient reversal as a Flax Linen module."""

from typing import TypeVar

try:
    from flax import linen as nn
except ImportError as error:
    raise ImportError("jaxgrl.linen needs Flax: pip install 'jaxgrl[flax]'") from error

from ._gradient_reversal import ScaleLike, gradient_reversal

T = TypeVar("T")


class GradientReversal(nn.Module):
    """``jaxgrl.gradient_reversal`` as a layer: no parameters, no rngs, no state.

    The identity in training and evaluation alike; only gradients are reversed.

    Two ways to give it the scale, the paper's lambda:

    - ``layer(x, scale)``, at call time: for a schedule, or any array. It may be traced,
      and wins over the attribute.
    - ``GradientReversal(scale=0.5)``, a Python number: for a constant. Linen hashes
      attributes: each new value traces anew, and an array fails under ``nn.jit``.

    Attributes:
      scale: The strength of the reversal, a number.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxgrl.linen import GradientReversal
      >>> layer = GradientReversal(scale=0.5)
      >>> x = jnp.ones(2)
      >>> print(layer.apply({}, x), jax.grad(lambda x: layer.apply({}, x).sum())(x))
      [1. 1.] [-0.5 -0.5]
    """

    scale: ScaleLike = 1.0

    def __call__(self, x: T, scale: ScaleLike = None) -> T:
        """Returns ``x``; see ``jaxgrl.gradient_reversal``.

        Args:
          x: An array or any pytree.
          scale: The strength of the reversal; None takes the attribute.
        """
        return gradient_reversal(x, self.scale if scale is None else scale)
