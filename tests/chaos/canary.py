"""A process that sleeps and computes, and writes down when it slept too long, and how slowly it computed: then the
machine was busy, and not notifyq slow. A busy machine lets a process that only sleeps go first, so sleeping alone shows
little."""

from __future__ import annotations

import json
import sys
import time

STEP_SECONDS = 0.01
STEPS = 9  # to sleep, then one to compute
LATE_SECONDS = 0.02


def compute() -> float:
    """Use a step's time of a processor. Returns how many times as long that took."""
    begin, used = time.monotonic(), time.thread_time()
    while time.thread_time() - used < STEP_SECONDS:
        pass
    return (time.monotonic() - begin) / STEP_SECONDS


if __name__ == "__main__":
    with open(sys.argv[1], "a", buffering=1, encoding="utf-8") as file:
        while True:
            for _ in range(STEPS):
                begin = time.monotonic()
                time.sleep(STEP_SECONDS)
                if (late := time.monotonic() - begin - STEP_SECONDS) > LATE_SECONDS:
                    file.write(json.dumps({"at": time.time(), "seconds": round(late, 3)}) + "\n")
            slow = compute()
            file.write(json.dumps({"at": time.time(), "slow": round(slow, 1)}) + "\n")
