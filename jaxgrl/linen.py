"""Gradient reversal, and the network around it, as Flax Linen modules."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax

try:
    from flax import linen as nn
except ImportError as error:
    raise ImportError(
        "`jaxgrl.linen` needs Flax. Install it with: pip install 'flax>=0.12.0'"
    ) from error

from ._dann import DANNOutput as DANNOutput
from ._dann import apply_dann
from ._gradient_reversal import ScaleLike, gradient_reversal

T = TypeVar("T")


class GradientReversal(nn.Module):
    """``jaxgrl.gradient_reversal`` as a layer: no parameters, no rngs, no state.

    There are two ways to give it the scale:

    - ``layer(x, scale)``, at call time, for a schedule, or any array. It may be traced,
      and wins over the attribute.
    - ``GradientReversal(0.5)``, a Python number, for a constant. Linen hashes
      attributes: each new value traces anew, and an array fails under ``nn.jit``.

    Attributes:
      scale: The strength of the reversal, a number: 1, full strength from step 0 on, by
        default.
      forward_mode: Whether to define ``jvp``, ``jacfwd`` and ``linearize``, as in
        ``jaxgrl.gradient_reversal``.

    Example:
      >>> import jax, jaxgrl.linen, jax.numpy as jnp
      >>> layer, x = jaxgrl.linen.GradientReversal(0.5), jnp.ones(2)
      >>> print(layer.apply({}, x), jax.grad(lambda x: layer.apply({}, x).sum())(x))
      [1. 1.] [-0.5 -0.5]
    """

    scale: ScaleLike = 1.0
    _: dataclasses.KW_ONLY
    forward_mode: bool = False

    def __call__(self, x: T, scale: ScaleLike | None = None) -> T:
        """Returns ``x``, an array or any pytree; see ``jaxgrl.gradient_reversal``.

        Without ``scale`` the attribute holds.
        """
        scale = self.scale if scale is None else scale
        return gradient_reversal(x, scale, forward_mode=self.forward_mode)


class DANN(nn.Module):
    """``jaxgrl.nnx.DANN`` in Linen: a domain-adversarial network of your own modules.

    Pass ``schedule(step)`` as ``scale`` in every training step. Without it the network
    trains at full strength from step 0 on, and the features can vanish.

    Attributes:
      feature_extractor: Maps inputs to features.
      label_classifier: Maps features to label logits.
      domain_discriminator: Maps features to domain logits.
      condition: As in ``jaxgrl.nnx.DANN``: None, or ``jaxgrl.multilinear_map`` or
        another callable of ``(features, predictions)``.
      activation: As in ``jaxgrl.nnx.DANN``: makes predictions from label logits.

    Example:
      >>> import jax, jaxgrl.linen, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> features = nn.Sequential([nn.Dense(32), nn.relu])
      >>> model = jaxgrl.linen.DANN(features, nn.Dense(3), nn.Dense(1))
      >>> x = jnp.ones((4, 8))
      >>> params = model.init(jax.random.key(0), x)
      >>> label_logits, domain_logits = model.apply(params, x, 0.5)
      >>> print(label_logits.shape, domain_logits.shape)
      (4, 3) (4, 1)

    References:
      As in ``jaxgrl.nnx.DANN``.
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
        """Returns the named tuple ``(label_logits, domain_logits)``.

        Args:
          x: The inputs of the feature extractor, all domains in one batch.
          scale: The strength of the reversal, as in ``jaxgrl.nnx.DANN``.
          **kwargs: As there. Under ``nn.jit`` name them in ``static_argnames``.
        """
        return apply_dann(self, x, scale, kwargs)
