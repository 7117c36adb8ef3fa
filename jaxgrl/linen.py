"""Gradient reversal, and the network around it, as Flax Linen modules."""

from collections.abc import Callable
from typing import Any, TypeVar

try:
    from flax import linen as nn
except ImportError as error:
    raise ImportError(
        "`jaxgrl.linen` needs Flax. Install it with: pip install 'flax>=0.12.0'"
    ) from error

from ._cdan import DANNOutput as DANNOutput
from ._cdan import domain_features
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

    def __call__(self, x: T, scale: ScaleLike | None = None) -> T:
        """Returns ``x``; see ``jaxgrl.gradient_reversal``.

        Args:
          x: An array or any pytree.
          scale: The strength of the reversal; None takes the attribute.
        """
        return gradient_reversal(x, self.scale if scale is None else scale)


class DANN(nn.Module):
    """``jaxgrl.nnx.DANN`` in Linen: a domain-adversarial network of your own modules.

    Attributes:
      feature_extractor: Maps inputs to features.
      label_classifier: Maps features to label logits.
      domain_discriminator: Maps features to domain logits.
      condition: As in ``jaxgrl.nnx.DANN``: None, or for CDAN
        ``jaxgrl.multilinear_map`` or any callable of ``(features, probabilities)``.
      deterministic: True, here or at the call, leaves the discriminator out, and
        ``domain_logits`` is then None.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from jaxgrl.linen import DANN
      >>> model = DANN(
      ...     feature_extractor=nn.Sequential([nn.Dense(32), nn.relu]),
      ...     label_classifier=nn.Dense(3),
      ...     domain_discriminator=nn.Dense(1),
      ... )
      >>> x = jnp.ones((4, 8))
      >>> params = model.init(jax.random.key(0), x)
      >>> label_logits, domain_logits = model.apply(params, x, 0.5)
      >>> print(label_logits.shape, domain_logits.shape)
      (4, 3) (4, 1)
      >>> print(model.apply(params, x, deterministic=True).domain_logits)
      None

    References:
      As in ``jaxgrl.nnx.DANN``.
    """

    feature_extractor: Callable[..., Any]
    label_classifier: Callable[..., Any]
    domain_discriminator: Callable[..., Any]
    condition: Callable[[Any, Any], Any] | None = None
    deterministic: bool = False

    def setup(self) -> None:
        """Makes the layer; the other modules are the attributes."""
        self.gradient_reversal = GradientReversal()

    def __call__(
        self,
        x: Any,
        scale: ScaleLike | None = None,
        *,
        deterministic: bool | None = None,
        **kwargs: Any,
    ) -> DANNOutput:
        """Returns the named tuple ``(label_logits, domain_logits)``.

        Args:
          x: The inputs of the feature extractor, all domains in one batch.
          scale: The strength of the reversal, as in ``jaxgrl.gradient_reversal``; it
            may be traced. None takes that of the layer, 1.
          deterministic: Whether to leave the discriminator out; None takes the
            attribute. ``init`` makes its parameters either way. Static: under
            ``nn.jit`` name it in ``static_argnames``, or set the attribute.
          **kwargs: Go to the feature extractor, ``train=True`` for example.
        """
        if deterministic is None:
            deterministic = self.deterministic
        features = self.feature_extractor(x, **kwargs)
        label_logits = self.label_classifier(features)
        if deterministic and not self.is_initializing():
            return DANNOutput(label_logits, None)
        seen = domain_features(features, label_logits, self.condition)
        seen = self.gradient_reversal(seen, scale)
        domain_logits = self.domain_discriminator(seen)
        return DANNOutput(label_logits, None if deterministic else domain_logits)
