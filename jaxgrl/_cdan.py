"""What CDAN adds to DANN: the map of features and predictions, entropy weights."""

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._checks import as_floating
from ._domain_metrics import members, of_own_domain, sum_by_domain
from ._dtypes import at_least_float32
from ._entropy import check_classes, entropy, log_probabilities


def multilinear_map(features: ArrayLike, probabilities: ArrayLike) -> jax.Array:
    """Returns the outer product of features and class probabilities, flattened.

    ``out[..., c * F + f] = probabilities[..., c] * features[..., f]``

    With it CDAN's discriminator can tell domains apart within each class. Pass it as
    ``condition=`` to a ``DANN``. By hand, stop the gradient of the probabilities.
    Source: Long et al., NeurIPS 2018, https://arxiv.org/abs/1705.10667

    Args:
      features: ``[..., F]``, floating.
      probabilities: ``[..., C]``, floating, likewise: the softmax, not the logits.

    Returns:
      ``[..., C * F]``, in the dtype of ``features``; multiplied in float32 or wider.

    Raises:
      TypeError, ValueError: If a dtype, or a shape, does not fit.
    """
    f = as_floating("features", features)
    p = as_floating("probabilities", probabilities)
    if not f.ndim or not p.ndim or f.shape[:-1] != p.shape[:-1]:
        raise ValueError(
            "`probabilities` must have the leading axes of `features`, got shape "
            f"{p.shape} for `features` of shape {f.shape}."
        )
    wide = at_least_float32(f.dtype, p.dtype)
    joint = p.astype(wide)[..., :, None] * f.astype(wide)[..., None, :]
    # Not -1, which an empty batch leaves undecided.
    return joint.reshape(*f.shape[:-1], p.shape[-1] * f.shape[-1]).astype(f.dtype)


def entropy_weights(
    label_logits: ArrayLike,
    domains: ArrayLike | None = None,
    *,
    num_domains: int = 2,
    where: ArrayLike | None = None,
    axis_name: Hashable | None = None,
    activation: Callable[..., Any] = jax.nn.softmax,
) -> jax.Array:
    """Returns the weights of CDAN+E: examples that are easy to classify count more.

    ``1 + exp(-H)``, with H the entropy of each row's prediction in nats, divided by its
    mean over the domain, so the domains stay balanced. Pass it to ``domain_loss``.
    Source: Long et al., NeurIPS 2018, section 3.3, https://arxiv.org/abs/1705.10667

    Args:
      label_logits: ``[batch, C]`` or, per pixel, ``[batch, H, W, C]``; floating.
      domains: The domain of each row, as in ``domain_loss``; None if all are of one.
      num_domains: As in ``domain_loss``.
      where: As in ``domain_loss``.
      axis_name: As in ``domain_loss``. The means are then over all devices.
      activation: ``jax.nn.softmax`` for one of C classes; ``jax.nn.sigmoid`` for C
        independent labels, whose entropies add, and for a binary head ``[..., 1]``.

    Returns:
      One weight for each row, float32 or wider. No gradient passes. The mean over a
      domain's counted rows is 1. A masked row has 0, so all are 0 if no row counts. A
      traced domain out of range has nan.

    Raises:
      TypeError, ValueError: As in ``domain_loss``, or for another ``activation``.
    """
    logits = as_floating("label_logits", label_logits)
    otherwise = (
        "A regression head has no entropy: leave `weights` out of `domain_loss`. Under "
        "a `vmap` over single rows pass its `axis_name`."
    )
    least = 2 if axis_name is None else 1  # one row alone would always weigh 1
    check_classes("label_logits", logits, activation, otherwise, least)
    shape = logits.shape[:-1]
    domains = jnp.zeros((1,) * len(shape), jnp.int32) if domains is None else domains
    member, mask = members(domains, num_domains, where, shape)
    logits = jax.lax.stop_gradient(jnp.where(mask[..., None], logits, 0))
    logits = logits.astype(at_least_float32(logits.dtype))
    values = 1 + jnp.exp(-entropy(log_probabilities(logits, activation)))
    sums = sum_by_domain(values[..., None], member, axis_name)
    counts = sum_by_domain(1, member, axis_name).astype(values.dtype)
    # Each value is 1 or more, so their sum is too unless the domain has no row.
    return values * of_own_domain(counts / jnp.maximum(sums, 1), member, mask)
