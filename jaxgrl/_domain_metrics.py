"""The loss and the accuracy of a domain discriminator, and the row weights of both."""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from ._checks import as_array, as_floating, as_mask, check_rows, check_size, indexed
from ._dtypes import at_least_float32
from ._entropy import log_probabilities


def domain_weights(
    domains: ArrayLike,
    *,
    num_domains: int = 2,
    where: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Returns each row's weight in a sum that is balanced over the domains.

    ``1 / (D * n_d)`` for a row of domain d, with n_d the rows of that domain and D the
    number of domains that have rows. They sum to 1, and balance any loss per row, such
    as the hinge ``jnp.sum(weights * jnp.maximum(0, 1 - signs * scores))``. With the
    weights of the whole batch, micro-batches add up to its loss and its gradient.

    Args:
      domains: The domain of each row, as in ``domain_loss``, of any shape.
      num_domains: K, 2 or more.
      where: Which rows count, bool, with as many axes as ``domains``, against which it
        broadcasts; all of them if None.
      axis_name: As in ``domain_loss``. The weights of all devices sum to 1.

    Returns:
      The weights, float32 (float64 in JAX's 64-bit mode). A masked row has 0, so all
      are 0 if no row counts. A traced domain out of range has nan.

    Raises:
      TypeError, ValueError: As in ``domain_loss``.
    """
    shape = as_array("domains", domains).shape
    given = () if where is None else as_array("where", where).shape
    if len(given) == len(shape):
        shape = tuple(m if n == 1 else n for n, m in zip(shape, given, strict=True))
    member, mask = members(domains, num_domains, where, shape)
    return _row_weights(member, mask, axis_name, jnp.result_type(float))


def domain_loss(
    logits: ArrayLike,
    domains: ArrayLike,
    *,
    num_domains: int = 2,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Returns the cross entropy of a domain discriminator, balanced over the domains.

    ``loss = 1/D * sum_d ( 1/n_d * sum_{i in d} cross_entropy(logits_i, d) )``

    This is the sum of ``domain_weights`` times cross entropy. Unequal numbers of source
    and target examples do not bias it. For two domains it is half of the paper's sum.
    Source: Ganin et al., JMLR 17, 2016, https://jmlr.org/papers/v17/15-239.html

    *Add* it to the label loss, without the reversal strength as a weight. The layer in
    front of the discriminator does the subtracting, for the feature extractor alone.

    Args:
      logits: The discriminator's output before any sigmoid or softmax, floating.
        ``[batch]`` or ``[batch, 1]``: the logit of domain 1, for two domains.
        ``[batch, K]``: a logit for each domain. There may be more batch axes.
      domains: The domain of each row (example, pixel or token), integer or bool: 0 for
        the source and 1 for the target, or 0 to K - 1. Any axis may have size 1:
        ``[batch]`` goes with logits ``[batch]`` or ``[batch, K]``, and
        ``domains[:, None, None]`` with ``[batch, H, W]`` or ``[batch, H, W, K]``.
      num_domains: K, 2 or more.
      where: Which rows count, bool, with the axes of ``domains``; all of them if None.
        Masked rows may hold anything, nan and out-of-range domains included.
      weights: Factor of each row's cross entropy, floating, with the axes of
        ``domains``; 1 if None. Domains stay balanced if its mean over each is 1.
      axis_name: The axis, or tuple of axes, of ``shard_map``, ``pmap`` or ``vmap`` that
        splits the batch. None under ``jit`` alone. Take ``jax.lax.pmean`` of the loss,
        inside what you differentiate, and of the gradient, to get those of the batch.

    Returns:
      A scalar, float32 or wider. It is 0, with a gradient of zeros, if no row counts
      (an empty or a fully masked batch). A traced domain out of range gives nan.

    Raises:
      TypeError: If a dtype does not fit.
      ValueError: If shapes do not fit, or outside ``jit`` a domain is out of range.
    """
    logits, member, mask = _checked(logits, domains, num_domains, where)
    activation = jax.nn.sigmoid if logits.shape[-1] == 1 else jax.nn.softmax
    log_p = jnp.squeeze(log_probabilities(logits, activation), axis=-2)
    losses = -jnp.sum(jnp.where(member, log_p, 0), axis=-1)
    if weights is not None:
        given = as_array("weights", weights)
        check_rows("weights", given, losses.shape, jnp.floating)
        losses = losses * jnp.where(mask, given, 0).astype(losses.dtype)
    rows = _row_weights(member, mask, axis_name, losses.dtype)
    return _over_devices(1, axis_name) * jnp.sum(rows * losses)


def domain_accuracy(
    logits: ArrayLike,
    domains: ArrayLike,
    *,
    num_domains: int = 2,
    where: ArrayLike | None = None,
    axis_name: Hashable | None = None,
) -> jax.Array:
    """Returns the balanced accuracy of a domain discriminator.

    The mean, over the domains that have rows, of the share of rows that are assigned to
    their domain. It is 1 if all are, and ``1 / K`` if the discriminator cannot tell the
    K domains apart, whatever their sizes.

    Args:
      logits: As in ``domain_loss``.
      domains: As in ``domain_loss``.
      num_domains: K, 2 or more.
      where: As in ``domain_loss``.
      axis_name: As in ``domain_loss``. ``jax.lax.pmean`` of it is that of the batch.

    Returns:
      A scalar, float32 or wider. It is nan if no row counts (an empty or a fully masked
      batch), a counted logit is nan, or a traced domain is out of range.

    Raises:
      TypeError, ValueError: As in ``domain_loss``.
    """
    logits, member, mask = _checked(logits, domains, num_domains, where)
    chosen = logits[..., 0] > 0 if logits.shape[-1] == 1 else jnp.argmax(logits, -1)
    hits = member & jax.nn.one_hot(chosen.astype(jnp.int32), num_domains, dtype=bool)
    hits = jnp.any(hits, axis=-1).astype(logits.dtype)
    hits = jnp.where(jnp.any(jnp.isnan(logits), axis=-1), jnp.nan, hits)
    rows = _row_weights(member, mask, axis_name, logits.dtype)
    # 1 but for rounding; 0 if no row counts on any device, and 0 / 0 is nan.
    total = _over_devices(jnp.sum(rows), axis_name)
    return _over_devices(1, axis_name) * jnp.sum(rows * hits) / total


def members(
    domains: ArrayLike, num_domains: int, where: ArrayLike | None, shape: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns each row's domain if it counts, one-hot ``[*shape, K]``, and the mask."""
    # Not as indices: on an Explicit mesh JAX refuses to sort or gather by them.
    check_size("num_domains", num_domains, 2)
    codes = as_array("domains", domains)
    check_rows("domains", codes, shape, jnp.integer, jnp.bool_)
    mask = as_mask(where, shape)
    # In NumPy, since under a trace even a constant becomes a tracer.
    here = (getattr(a, "is_fully_addressable", True) for a in (domains, where))
    if not any(isinstance(a, Tracer) for a in (domains, where)) and all(here):
        counted = np.asarray(domains)
        counted = counted if where is None else np.where(where, counted, 0)
        if counted.size and not 0 <= counted.min() <= counted.max() < num_domains:
            raise ValueError(
                f"`domains` must lie in 0 to {num_domains - 1} for "
                f"`num_domains={num_domains}`, got {counted.min()} to {counted.max()}. "
                "Pass a larger `num_domains`, or mask padding with `where`."
            )
    codes = jnp.broadcast_to(codes.astype(jnp.int32), shape)
    member = jax.nn.one_hot(codes, num_domains, dtype=bool)
    return member & mask[..., None], mask


def sum_by_domain(values: ArrayLike, member: jax.Array, axis_name: Any) -> jax.Array:
    """Returns the sum over each domain's rows, on all devices, ``[1, ..., 1, K]``."""
    rows = tuple(range(member.ndim - 1))
    sums = jnp.sum(jnp.where(member, values, 0), axis=rows, keepdims=True)
    return _over_devices(sums, axis_name)


def of_own_domain(table: jax.Array, member: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns each row's entry of ``[1, ..., 1, K]``: masked 0, out of range nan."""
    found = jnp.sum(jnp.where(member, table, 0), axis=-1)
    return jnp.where(mask & ~jnp.any(member, axis=-1), jnp.nan, found)


def _row_weights(member: Any, mask: Any, axis_name: Any, dtype: Any) -> jax.Array:
    counts = sum_by_domain(1, member, axis_name).astype(dtype)
    present = jnp.sum(counts > 0).astype(dtype)
    return of_own_domain(1 / jnp.maximum(present * counts, 1), member, mask)


def _over_devices(value: Any, axis_name: Hashable | None) -> Any:
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    # One by one: psum refuses several axes if the value varies only over some.
    for name in names if axis_name is not None else ():
        value = jax.lax.psum(value, name)
    return value


def _checked(
    logits: ArrayLike, domains: ArrayLike, num_domains: int, where: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns logits ``[..., 1 or K]``, their ``members`` and mask, all checked."""
    z, d = as_floating("logits", logits), as_array("domains", domains)
    check_size("num_domains", num_domains, 2)
    last = z.shape[-1] if z.ndim else 1
    sizes = (1, 2) if num_domains == 2 else (num_domains,)
    per_class = z.ndim == d.ndim + 1 and last in sizes
    # Two logits beside one domain could be two classes.
    per_row = z.ndim == d.ndim and not (last == 2 and d.shape[-1] == 1)
    if not per_class and not (per_row and num_domains == 2):
        raise ValueError(
            f"`logits` must have the axes of `domains`, or one more of size "
            f"{' or '.join(map(str, sizes))}, got shape {z.shape} for `domains` of "
            f"shape {d.shape} and `num_domains={num_domains}`. If the last axis has a "
            f"logit for each domain, pass `num_domains={max(2, last)}` and "
            f"`{indexed('domains', d.ndim, max(0, z.ndim - 1))}`. If each logit has "
            "a domain of its own, pass `num_domains=2`, `logits[..., None]` and "
            f"`{indexed('domains', d.ndim, z.ndim)}`."
        )
    shape = z.shape[:-1] if per_class else z.shape
    member, mask = members(domains, num_domains, where, shape)
    # A gradient through whatever masked rows held could be nan.
    z = jnp.where(mask[..., None] if per_class else mask, z, 0)
    z = z if per_class else z[..., None]
    return z.astype(at_least_float32(z.dtype)), member, mask
