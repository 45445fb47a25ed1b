"""When to try again: exponential backoff with full jitter."""

from __future__ import annotations

import random

LONGEST_WAIT_SECONDS = 3600.0


def backoff_seconds(attempt: int, base: float) -> float:
    """Seconds until the try after `attempt` (from 1): evenly from 0 to base * 2**(attempt - 1), at most an hour.

    With the default base of 2: up to 2, 4, 8, 16, 32, ... seconds, on average half of that; ten attempts take
    at most 17 minutes. "Full jitter" of Amazon's "Exponential Backoff and Jitter" (2015): what failed
    together, since a service was down, doesn't come back together.
    """
    return random.uniform(0.0, ceiling_seconds(attempt, base))


def ceiling_seconds(attempt: int, base: float) -> float:
    """The longest that `backoff_seconds` may say."""
    return min(LONGEST_WAIT_SECONDS, base * 2.0 ** min(attempt - 1, 64))
