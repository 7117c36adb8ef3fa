"""Gradient reversal as a Flax NNX module."""

from typing import TypeVar

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("jaxgrl.nnx needs Flax: pip install 'jaxgrl[flax]'") from error

from ._gradient_reversal import ScaleLike, gradient_reversal

T = TypeVar("T")


class GradientReversal(nnx.Module):
    """``jaxgrl.gradient_reversal`` as a layer: no parameters, no rngs, no state.

    The identity in training and evaluation alike; only gradients are reversed.

    Three ways to give it the scale, the paper's lambda:

    - ``layer(x, scale)``, at call time: for a schedule. It may be traced, and wins over
      the constructor's.
    - ``GradientReversal(0.5)``, a Python number: for a constant. It is static, part of
      the graph definition, so that each new value traces ``nnx.jit`` anew.
    - ``GradientReversal(nnx.Variable(jnp.array(0.5)))``: for a value that changes and
      belongs to the model. It is data: setting it does not retrace, and a checkpoint
      holds it. It never receives a gradient.

    Args:
      scale: The strength of the reversal, as in ``jaxgrl.gradient_reversal``. A pytree
        of several goes in at call time.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxgrl.nnx import GradientReversal
      >>> model = nnx.Sequential(
      ...     GradientReversal(0.5),
      ...     nnx.Linear(1, 1, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0)),
      ... )
      >>> x = jnp.ones((1, 1))
      >>> print(model(x), nnx.grad(lambda x: model(x).sum())(x))
      [[1.]] [[-0.5]]
    """

    def __init__(self, scale: ScaleLike = 1.0):
        self.scale = scale

    def __call__(self, x: T, scale: ScaleLike = None) -> T:
        """Returns ``x``; see ``jaxgrl.gradient_reversal``.

        Args:
          x: An array or any pytree.
          scale: The strength of the reversal; None takes the constructor's.
        """
        return gradient_reversal(x, self.scale if scale is None else scale)
