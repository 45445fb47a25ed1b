"""How long to wait before the next attempt: exponential backoff with full jitter."""

from __future__ import annotations

import random

LONGEST_WAIT_SECONDS = 3600.0


def backoff_seconds(attempt: int, base: float) -> float:
    """Seconds to wait after this attempt (the first is 1): drawn evenly from 0 to base * 2**(attempt - 1), at most an
    hour.

    With the default base of 2: up to 2, 4, 8, 16, 32, ... seconds, on average half of that. The waits between ten
    attempts sum up to 17 minutes at most. This is "full jitter" as in Amazon's "Exponential Backoff and Jitter" (2015):
    tasks that fail together, since a service is down, don't come back together.
    """
    return random.uniform(0.0, ceiling_seconds(attempt, base))


def ceiling_seconds(attempt: int, base: float) -> float:
    """The longest wait that `backoff_seconds` may return."""
    return min(LONGEST_WAIT_SECONDS, base * 2.0 ** min(attempt - 1, 64))
