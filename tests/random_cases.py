"""How many cases Hypothesis draws for a test of random programs, batches, arguments."""

import os

from hypothesis import HealthCheck, Phase, settings

EXAMPLES = os.environ.get("JAXGRL_EXAMPLES")


def cases(count):
    """Runs the same `count` cases each time, or JAXGRL_EXAMPLES others."""
    return settings(
        max_examples=int(EXAMPLES or count),
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        # Not explain: it would compile a failing program many times more.
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
