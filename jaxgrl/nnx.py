"""Gradient reversal, and the network around it, as Flax NNX modules."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax

try:
    from flax import nnx
except ImportError as error:
    raise ImportError("jaxgrl.nnx needs Flax: pip install 'jaxgrl[flax]'") from error

from ._dann import DANNOutput as DANNOutput
from ._dann import apply_dann
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

    Without a scale the layer reverses at full strength from step 0 on.

    Args:
      scale: The strength of the reversal, as in ``jaxgrl.gradient_reversal``. A pytree
        of several goes in at call time.
      forward_mode: Whether ``jvp``, ``jacfwd`` and ``linearize`` are defined, as in
        ``jaxgrl.gradient_reversal``.

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

    def __init__(self, scale: ScaleLike = 1.0, *, forward_mode: bool = False):
        self.scale = scale
        self.forward_mode = forward_mode

    def __call__(self, x: T, scale: ScaleLike | None = None) -> T:
        """Returns ``x``; see ``jaxgrl.gradient_reversal``.

        Args:
          x: An array or any pytree.
          scale: The strength of the reversal; None takes the constructor's.
        """
        scale = self.scale if scale is None else scale
        return gradient_reversal(x, scale, forward_mode=self.forward_mode)


class DANN(nnx.Module):
    """A domain-adversarial network of your own three modules.

    The gradient reversal layer is between them::

        x -> feature_extractor -+-> label_classifier -> label_logits
                                +-> gradient_reversal -> domain_discriminator
                                                            -> domain_logits

    The modules are callables in this order. Features may be any pytree, outputs have
    any shape, and K domains are a discriminator with K outputs. Add
    ``jaxgrl.domain_loss`` of the domain logits to the label loss.

    Pass ``schedule(step)`` as ``scale`` in every training step. Without it the network
    trains at full strength from step 0 on, and the features can vanish.

    Both logits are returned in training and evaluation alike. Under ``jit`` a
    discriminator whose logits you do not use costs nothing. ``model.train()`` and
    ``model.eval()`` set Dropout and BatchNorm in all three modules.

    Args:
      feature_extractor: Maps inputs to features.
      label_classifier: Maps features to label logits.
      domain_discriminator: Maps features to domain logits; for ``jaxgrl.domain_loss``
        ``[batch]``, ``[batch, 1]`` or ``[batch, K]``.
      condition: None for DANN; for CDAN ``jaxgrl.multilinear_map``, or any callable of
        ``(features, predictions)``. Its output is reversed and goes into the
        discriminator, in place of the features. The predictions are ``activation`` of
        the label logits and receive no gradient, as in the authors' code.
      activation: What makes predictions of label logits, in float32 or wider. One of

        - ``jax.nn.softmax``: one of C classes, for logits ``[batch, ..., C]``;
        - ``jax.nn.sigmoid``: independent labels. A binary head ``[batch, ..., 1]``
          becomes two classes, ``[1 - p, p]``;
        - any other callable: ``lambda y: y`` for a regression.

    Attributes:
      gradient_reversal: The layer, ``GradientReversal()``. Replace it for another
        default scale or for ``forward_mode=True``.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from jaxgrl.nnx import DANN
      >>> rngs = nnx.Rngs(0)
      >>> model = DANN(
      ...     feature_extractor=nnx.Sequential(nnx.Linear(8, 32, rngs=rngs), nnx.relu),
      ...     label_classifier=nnx.Linear(32, 3, rngs=rngs),
      ...     domain_discriminator=nnx.Linear(32, 1, rngs=rngs),
      ... )
      >>> label_logits, domain_logits = model(jnp.ones((4, 8)), 0.5)
      >>> print(label_logits.shape, domain_logits.shape)
      (4, 3) (4, 1)

    References:
      Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 17, 2016,
      https://jmlr.org/papers/v17/15-239.html
      Long et al., Conditional Adversarial Domain Adaptation, NeurIPS 2018,
      https://arxiv.org/abs/1705.10667
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
          scale: The strength of the reversal, as in ``jaxgrl.gradient_reversal``; it
            may be traced. None takes that of the layer, 1. It goes to no module.
          **kwargs: Each goes to every one of the three modules whose call names it:
            ``mask=mask`` for attention, for example. A module's first argument and its
            own ``**kwargs`` name nothing.

        Raises:
          TypeError: If no module names a keyword.
          ValueError: If with ``condition`` the label logits do not fit ``activation``.
        """
        return apply_dann(self, x, scale, kwargs)
