"""For tests of an app: run one task, drain a queue, move the clock, and check what was enqueued.

Nothing is mocked. A task runs by the code that runs it in a worker. Everything else uses a real database, which the
pytest plugin makes for each test. Only `notifyq.testing.plugin` imports pytest.

    inline     run one task, without a worker and a database: encode, decode, handle it
    drain      run a worker until no task can run
    clock      let time pass
    enqueued   list enqueued tasks, and assert that some are there
    databases  a database for each test
    plugin     such databases as fixtures of pytest
    source     where the tasks of a test are: an app, a connection or a DSN
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
