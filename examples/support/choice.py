"""The rule that chooses a scale; what benchmarks/adaptation.py compares it with."""

from collections.abc import Sequence
from typing import Any

import numpy as np


def nearest_to_one(scales: Sequence[float], scores: Any) -> int:
    """Returns the index of the scale nearest to 1 that is no clearly worse than best.

    A scale is *not clearly worse* if its mean difference to the best scale, paired by
    seed, is at most one standard error of that mean. Near is meant on a logarithmic
    scale, so 0 is farthest. Of two equally near, the one with the better mean wins.

    Args:
      scales: The grid.
      scores: InfoMax, ``[scales, seeds]``, with the same seeds in every row, and two or
        more. A scale with a score that is not finite is out.

    Raises:
      ValueError: If every scale is out, or there is one seed only.
    """
    scores = np.where(np.isfinite(scores), scores, np.nan).astype(np.float64)
    count = scores.shape[1]
    if count < 2:
        raise ValueError(f"scores must be of 2 or more seeds, got {count}")
    means = scores.mean(axis=1)
    if np.isnan(means).all():
        raise ValueError("every scale diverged; lower the learning rate")
    lost = scores[np.nanargmax(means)] - scores
    error = lost.std(axis=1, ddof=1) / np.sqrt(count)
    close = np.flatnonzero(lost.mean(axis=1) <= error)
    with np.errstate(divide="ignore"):
        distance = np.abs(np.log(scales))
    return int(min(close, key=lambda i: (distance[i], -means[i])))
