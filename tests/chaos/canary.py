"""Does nothing but sleep, and writes down when it woke up late: then the machine was busy, and not notifyq slow."""

from __future__ import annotations

import json
import sys
import time

STEP_SECONDS = 0.01
LATE_SECONDS = 0.02

if __name__ == "__main__":
    with open(sys.argv[1], "a", buffering=1, encoding="utf-8") as file:
        while True:
            begin = time.monotonic()
            time.sleep(STEP_SECONDS)
            if (late := time.monotonic() - begin - STEP_SECONDS) > LATE_SECONDS:
                file.write(json.dumps({"at": time.time(), "seconds": round(late, 3)}) + "\n")
