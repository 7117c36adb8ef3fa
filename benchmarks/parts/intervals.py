"""The two kinds of 95 % interval that the benchmarks state."""

from collections.abc import Sequence

import numpy as np
import scipy.stats


def median_interval(
    values: Sequence[float], comparisons: int = 1
) -> tuple[float, float] | None:
    """Returns the 95 % interval of a median, or None of fewer than six values.

    It says where the median of many such values lies, of times that a busy machine
    disturbs for instance. It is exact for any distribution: the ranks between which the
    median lies come from the binomial distribution.

    Args:
      values: Independent values, in any order.
      comparisons: How many intervals hold jointly (Bonferroni). More of them need more
        values.
    """
    ordered = sorted(values)
    rank = int(scipy.stats.binom.ppf(0.025 / comparisons, len(ordered), 0.5))
    return (ordered[rank - 1], ordered[-rank]) if rank else None


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95 % interval of a mean, of two values or more.

    It says where the mean over all seeds lies, of differences paired by seed for
    instance. It is Student's t: right for values that are about normal.
    """
    margin = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    mean = float(np.mean(values))
    return mean - float(margin), mean + float(margin)
