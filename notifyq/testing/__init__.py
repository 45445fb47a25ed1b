"""For tests of an app: run a task by itself, drain a queue, move the clock, and see what was enqueued.

Nothing is mocked. A task is run by the code that runs it in a worker, and the rest works on a real database, which
the pytest plugin makes for each test; nothing here but `notifyq.testing.plugin` imports pytest.

    inline     run one task: encoded, decoded, handled; no worker, no database
    drain      run all that can be run, by a worker
    clock      make it later
    enqueued   what waits in the database, and what was expected there
    databases  a database for each test
    plugin     that one as fixtures of pytest
"""

from .clock import advance
from .databases import Databases
from .drain import Drained, drain
from .enqueued import assert_enqueued, enqueued, refute_enqueued
from .inline import Ran, run_inline

__all__ = [
    "Databases",
    "Drained",
    "Ran",
    "advance",
    "assert_enqueued",
    "drain",
    "enqueued",
    "refute_enqueued",
    "run_inline",
]
