"""Gradient reversal, and the network around it, as Flax Linen modules."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

try:
    from flax import linen as nn
except ImportError as error:
    raise ImportError(
        "`jaxgrl.linen` needs Flax. Install it with: pip install 'flax>=0.12.0'"
    ) from error

from ._dann import DANNOutput as DANNOutput
from ._dann import apply_dann
from ._gradient_reversal import ScaleLike, T, gradient_reversal


class GradientReversal(nn.Module):
    """``jaxgrl.nnx.GradientReversal`` in Linen, with the same arguments as attributes.

    Pass a schedule's scale, or an array, at call time. The attribute is for a constant
    number: Linen hashes it. A new value traces anew, and an array fails in ``nn.jit``.
    The default, 1, is full strength from step 0 on. There are no variables:
    ``GradientReversal().apply({}, x, scale)``.
    """

    scale: ScaleLike = 1.0
    _: dataclasses.KW_ONLY
    forward_mode: bool = False

    def __call__(self, x: T, scale: ScaleLike | None = None) -> T:
        """Returns ``x``, any pytree; ``scale`` defaults to the attribute."""
        scale = self.scale if scale is None else scale
        return gradient_reversal(x, scale, forward_mode=self.forward_mode)


class DANN(nn.Module):
    """``jaxgrl.nnx.DANN`` in Linen, with the same arguments as attributes.

    Pass ``schedule(step)`` as ``scale`` in every training step. Without it the network
    trains at full strength from step 0 on, and the features can vanish.
    """

    feature_extractor: Callable[..., Any]
    label_classifier: Callable[..., Any]
    domain_discriminator: Callable[..., Any]
    condition: Callable[[Any, Any], Any] | None = None
    activation: Callable[[Any], Any] = jax.nn.softmax

    def setup(self) -> None:
        """Makes the layer; the other modules are the attributes."""
        self.gradient_reversal = GradientReversal()

    def __call__(
        self, x: Any, scale: ScaleLike | None = None, **kwargs: Any
    ) -> DANNOutput:
        """As in NNX. Under ``nn.jit`` name bool keywords in ``static_argnames``."""
        return apply_dann(self, x, scale, kwargs)
