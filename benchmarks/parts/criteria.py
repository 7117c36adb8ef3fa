"""Criteria that judge a run without target labels, and the choice of the best.

The third criterion, InfoMax, is ``jaxgrl.information_maximization``. Whatever is not
finite makes a criterion nan, so that a run that diverged is never chosen.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def centroid_agreement(
    source_features: jax.Array,
    source_labels: jax.Array,
    target_features: jax.Array,
    target_logits: jax.Array,
) -> jax.Array:
    """Returns how often the classifier agrees with the nearest class centroid.

    Args:
      source_features: ``[n, F]``; their means over each class are the centroids.
      source_labels: ``[n]``, from 0 to C - 1, each class at least once.
      target_features: ``[m, F]``.
      target_logits: ``[m, C]``.

    References:
      Our own; its relatives are the pseudo-labels of Liang et al., Do We Really Need to
      Access the Source Data?, ICML 2020, https://arxiv.org/abs/2002.08546
    """
    member = jax.nn.one_hot(source_labels, target_logits.shape[1])
    centroids = member.T @ source_features / jnp.sum(member, axis=0)[:, None]
    # The squared distance, but for the target's own length.
    distances = jnp.sum(centroids**2, axis=1)[None] - 2 * target_features @ centroids.T
    agree = jnp.argmin(distances, axis=1) == jnp.argmax(target_logits, axis=1)
    finite = jnp.all(jnp.isfinite(distances)) & jnp.all(jnp.isfinite(target_logits))
    return jnp.where(finite, jnp.mean(agree), jnp.nan)


def reverse_validation(
    fit: Callable[[jax.Array], Callable[[jax.Array], jax.Array]],
    target_logits: jax.Array,
    source_inputs: jax.Array,
    source_labels: jax.Array,
) -> jax.Array:
    """Returns the accuracy, on held-out source examples, of a network trained back.

    Args:
      fit: Trains a network like the first, with the roles of the domains swapped, on
        the target's labels that it is given; returns a function from inputs to label
        logits.
      target_logits: What the first network says of the target, ``[m, classes]``.
      source_inputs: Source examples that neither training has seen, ``[n, ...]``.
      source_labels: Their labels, ``[n]``.

    References:
      Zhong et al., Cross Validation Framework to Choose Amongst Models and Datasets for
      Transfer Learning, ECML PKDD 2010; Ganin et al., Domain-Adversarial Training of
      Neural Networks, JMLR 17, 2016, section 5.1.1
    """
    predict = fit(jnp.argmax(target_logits, axis=-1))
    logits = predict(source_inputs)
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == source_labels)
    finite = jnp.all(jnp.isfinite(target_logits)) & jnp.all(jnp.isfinite(logits))
    return jnp.where(finite, accuracy, jnp.nan)


def best(scales: Sequence[float], scores: Any) -> int:
    """Returns the index of the scale with the best mean of a criterion.

    Args:
      scales: The grid.
      scores: The criterion, ``[scales, seeds]``. A scale with a score that is not
        finite is out. Of equal means the first wins.

    Raises:
      ValueError: If every scale is out.
    """
    means = np.mean(np.asarray(scores, np.float64), axis=1)
    kept = [i for i in range(len(scales)) if np.isfinite(means[i])]
    if not kept:
        raise ValueError("every scale diverged; lower the learning rate")
    return max(kept, key=lambda i: means[i])
