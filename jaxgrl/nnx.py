"""Gradient reversal, and the network around it, as Flax NNX modules."""

from collections.abc import Callable
from typing import Any

import jax

try:
    from flax import nnx
except ImportError as error:
    command = "pip install 'flax>=0.12.0'"
    raise ImportError(f"`jaxgrl.nnx` needs Flax. Install it with: {command}") from error

from ._dann import DANNOutput as DANNOutput
from ._dann import apply_dann
from ._gradient_reversal import ScaleLike, T, gradient_reversal


class GradientReversal(nnx.Module):
    """``jaxgrl.gradient_reversal`` as a layer: no parameters and no rngs.

    There are three ways to give it the scale:

    - ``layer(x, scale)``, for a schedule. It may be traced, and wins over the others.
    - ``GradientReversal(0.5)``, for a constant. A new number traces ``nnx.jit`` anew.
    - ``GradientReversal(nnx.Variable(jnp.array(0.5)))``, for a value that changes and
      belongs to the model. Setting it does not retrace, and a checkpoint holds it.

    Args:
      scale: As in ``jaxgrl.gradient_reversal``. The default, 1, is full strength from
        step 0 on. Pass a pytree of several at call time.
      forward_mode: As in ``jaxgrl.gradient_reversal``.
    """

    def __init__(self, scale: ScaleLike = 1.0, *, forward_mode: bool = False):
        self.scale = scale
        self.forward_mode = forward_mode

    def __call__(self, x: T, scale: ScaleLike | None = None) -> T:
        """Returns ``x``, any pytree; ``scale`` defaults to the constructor's."""
        scale = self.scale if scale is None else scale
        return gradient_reversal(x, scale, forward_mode=self.forward_mode)


class DANN(nnx.Module):
    """A domain-adversarial network of your own three modules.

    The gradient reversal layer is between them::

        x -> feature_extractor -+-> label_classifier
                                +-> gradient_reversal -> domain_discriminator

    Features may be any pytree. Add ``jaxgrl.domain_loss`` of the domain logits to the
    label loss. Under ``jit`` domain logits that you do not use cost nothing.

    Pass ``schedule(step)`` as ``scale`` in every training step. Without it the network
    trains at full strength from step 0 on, and the features can vanish. Replace
    ``model.gradient_reversal`` for another default scale or for ``forward_mode=True``.
    Source: Ganin et al., JMLR 17, 2016, https://jmlr.org/papers/v17/15-239.html

    Args:
      feature_extractor: Maps inputs to features.
      label_classifier: Maps features to label logits.
      domain_discriminator: Maps features to domain logits.
      condition: None for DANN. For CDAN ``jaxgrl.multilinear_map``, or any callable of
        ``(features, predictions)``, whose output goes through the layer into the
        discriminator. The predictions receive no gradient, as in the authors' code.
      activation: Makes the predictions from the label logits, in float32 or wider:
        ``jax.nn.softmax`` for ``[batch, ..., C]``; ``jax.nn.sigmoid`` for independent
        labels and for a binary head ``[batch, ..., 1]``, which becomes two classes; or
        another callable, such as ``lambda y: y`` for a regression.
    """

    def __init__(
        self,
        feature_extractor: Callable[..., Any],
        label_classifier: Callable[..., Any],
        domain_discriminator: Callable[..., Any],
        *,
        condition: Callable[[Any, Any], Any] | None = None,
        activation: Callable[[Any], Any] = jax.nn.softmax,
    ):
        self.feature_extractor = feature_extractor
        self.label_classifier = label_classifier
        self.gradient_reversal = GradientReversal()
        self.domain_discriminator = domain_discriminator
        self.condition = condition
        self.activation = activation

    def __call__(
        self, x: Any, scale: ScaleLike | None = None, **kwargs: Any
    ) -> DANNOutput:
        """Returns the named tuple ``(label_logits, domain_logits)``.

        Args:
          x: The inputs of the feature extractor, all domains in one batch.
          scale: The strength of the reversal, as in ``GradientReversal``.
          **kwargs: Each goes to every module whose call has a parameter of that name,
            such as ``mask``. A first parameter and ``**kwargs`` do not count.

        Raises:
          TypeError: If no module names a keyword.
          ValueError: If with ``condition`` the label logits do not fit ``activation``.
        """
        return apply_dann(self, x, scale, kwargs)
