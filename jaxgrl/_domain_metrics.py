"""The loss and the accuracy of a domain discriminator."""

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.typing import ArrayLike

from ._checks import check_floating, check_rows, checked_mask
from ._dtypes import at_least_float32


def domain_loss(
    logits: ArrayLike,
    domains: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> jax.Array:
    """Returns the cross entropy of a domain discriminator, balanced over the domains.

    The mean over the domains present of the mean over the examples of each::

        loss = 1/D * sum_d ( 1/n_d * sum_{i in d} cross_entropy(logits_i, d) )

    so that unequal numbers of source and target examples do not tilt it. For two
    domains this is half of the paper's sum of the source mean and the target mean.

    *Add* it to the label loss; the gradient reversal layer in front of the
    discriminator does the subtracting, and only for the feature extractor. Do not
    weight it with the reversal strength: that lives in the layer.

    Args:
      logits: The discriminator's output before any sigmoid or softmax, floating:
        ``[batch]`` or ``[batch, 1]`` for two domains (the logit of domain 1), or
        ``[batch, K]`` for K of them.
      domains: The domain of each example, ``[batch]``, integer or bool: 0 for the
        source and 1 for the target, or 0 to K - 1.
      where: Which examples count, ``[batch]``, bool; all of them if None. Masked rows
        may hold anything, nan and out-of-range domains included.
      weights: What the cross entropy of each example is multiplied by, ``[batch]``,
        floating; 1 if None. With mean 1 in each domain, as ``entropy_weights`` gives
        them, the balance of the domains stays as it is.

    Returns:
      A scalar, float32 or wider. It is 0, with a gradient of zeros, if no example
      counts. A traced domain out of range gives nan.

    Raises:
      ValueError: If the shapes do not fit, or a concrete domain is out of range;
        outside ``jit``, ``domains`` is read for that.
      TypeError: If a dtype does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxgrl import domain_loss
      >>> logits = jnp.array([-2.0, -2.0, -2.0, 2.0])  # three of the source, one target
      >>> print(f"{domain_loss(logits, jnp.array([0, 0, 0, 1])):.4f}")
      0.1269

    References:
      Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 17, 2016,
      https://jmlr.org/papers/v17/15-239.html
    """
    logits, domains, mask = _checked(logits, domains, where)
    if logits.shape[1] == 1:
        losses = optax.losses.sigmoid_binary_cross_entropy(
            logits[:, 0], domains.astype(logits.dtype)
        )
    else:
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, domains)
    losses = jnp.where(_in_range(domains, logits), losses, jnp.nan)
    if weights is not None:
        check_rows("weights", weights, len(losses), (jnp.floating,), "a floating")
        weights = jnp.asarray(weights).astype(losses.dtype)
        losses = losses * jnp.where(mask, weights, 0)
    return _balanced_mean(losses, domains, mask, _num_domains(logits))


def domain_accuracy(
    logits: ArrayLike, domains: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    """Returns the balanced accuracy of a domain discriminator.

    The mean over the domains present of the share of their examples that are assigned
    to them. 1 means that the features give their domain away; ``1 / K`` that the
    discriminator cannot tell the K domains apart, whatever their sizes.

    Args:
      logits: As in ``domain_loss``: ``[batch]``, ``[batch, 1]`` or ``[batch, K]``.
      domains: As in ``domain_loss``: ``[batch]``, integer or bool.
      where: As in ``domain_loss``: ``[batch]``, bool, or None.

    Returns:
      A scalar, float32 or wider, that stays on the device. It is nan where there is no
      accuracy: if no example counts, if a logit that counts is nan, or if a traced
      domain is out of range.

    Raises:
      ValueError: If the shapes do not fit, or a concrete domain is out of range;
        outside ``jit``, ``domains`` is read for that.
      TypeError: If a dtype does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxgrl import domain_accuracy
      >>> logits = jnp.array([-2.0, -2.0, 2.0, 2.0])
      >>> print(f"{domain_accuracy(logits, jnp.array([0, 0, 0, 1])):.4f}")
      0.8333

    References:
      Ganin et al., Domain-Adversarial Training of Neural Networks, JMLR 17, 2016,
      https://jmlr.org/papers/v17/15-239.html
    """
    logits, domains, mask = _checked(logits, domains, where)
    if logits.shape[1] == 1:
        predictions = (logits[:, 0] > 0).astype(domains.dtype)
    else:
        predictions = jnp.argmax(logits, axis=1).astype(domains.dtype)
    hits = (predictions == domains).astype(logits.dtype)
    valid = _in_range(domains, logits) & ~jnp.any(jnp.isnan(logits), axis=1)
    accuracy = _balanced_mean(hits, domains, mask, _num_domains(logits))
    return jnp.where(jnp.all(valid) & jnp.any(mask), accuracy, jnp.nan)


def _checked(
    logits: ArrayLike, domains: ArrayLike, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns logits [batch, 1 or K], domains [batch] and mask [batch], all checked.

    Masked rows come back as zeros: a gradient through whatever they held could be nan.
    """
    if logits is None:
        raise TypeError(
            "`logits` must be an array, got None: a DANN returns no domain logits in "
            "evaluation, after eval() or with deterministic=True."
        )
    given = jnp.asarray(logits)
    check_floating("logits", given)
    if given.ndim not in (1, 2) or given.shape[1:] == (0,):
        raise ValueError(
            "`logits` must have shape [batch], [batch, 1] or [batch, K], got shape "
            f"{given.shape}."
        )
    batch = given.shape[0]
    kinds = (jnp.integer, jnp.bool_)
    check_rows("domains", domains, batch, kinds, "an integer or bool")
    mask = checked_mask(where, batch)

    wide = given.astype(at_least_float32(given.dtype))
    wide = wide[:, None] if wide.ndim == 1 else wide
    _check_range(domains, where, _num_domains(wide))
    return (
        jnp.where(mask[:, None], wide, 0),
        jnp.where(mask, jnp.asarray(domains).astype(jnp.int32), 0),
        mask,
    )


def _check_range(domains: ArrayLike, where: ArrayLike | None, num_domains: int) -> None:
    """Raises ValueError for a domain out of range, where its value is known."""
    if any(isinstance(value, Tracer) for value in (domains, where)):
        return
    with jax.ensure_compile_time_eval():
        counted = jnp.asarray(domains).astype(jnp.int32)
        if where is not None:
            counted = jnp.where(jnp.asarray(where), counted, 0)
        if counted.size and not 0 <= counted.min() <= counted.max() < num_domains:
            raise ValueError(
                f"`domains` must lie in 0 to {num_domains - 1} for these logits, got "
                f"{counted.min()} to {counted.max()}."
            )


def _num_domains(logits: jax.Array) -> int:
    return max(2, logits.shape[1])


def _in_range(domains: jax.Array, logits: jax.Array) -> jax.Array:
    return (domains >= 0) & (domains < _num_domains(logits))


def _balanced_mean(
    values: jax.Array, domains: jax.Array, mask: jax.Array, num_domains: int
) -> jax.Array:
    """Returns the mean over the domains present of the mean over their examples."""
    member = jax.nn.one_hot(domains, num_domains, dtype=values.dtype)
    member = jnp.where(mask[:, None], member, 0)
    counts = jnp.sum(member, axis=0, keepdims=True)
    present = jnp.sum(counts > 0, dtype=values.dtype)
    weights = jnp.sum(member / jnp.maximum(counts, 1), axis=1) / jnp.maximum(present, 1)
    return jnp.sum(weights * values)
