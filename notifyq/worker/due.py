"""The due check: make scheduled tasks ready whose time has come, and tell the State what the answer means for it.

One statement (check_due.sql) promotes due tasks, and says when the next one is due, whether tasks are ready, and which
queues are paused or limited. It also sends the echo that proves the bell.
"""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import NamedTuple

from ..database.connection import PROOF_SECONDS, SQL, Connection
from .admission import Admission
from .capacity import Capacity
from .left_out import unless_refused
from .listen import Listener
from .state import PROMOTED_AT_ONCE, Found, Position, State

_Args = tuple[list[str], list[str]]


class Checked(NamedTuple):
    sent_echo: bool
    found: bool  # ready tasks, or due ones, which are ready now


class DueCheck:
    """Makes the due checks of one claimer."""

    def __init__(self, capacity: Capacity, admission: Admission, listener: Listener, state: State) -> None:
        self._capacity = capacity
        self._admission = admission
        self._left_out = admission.left_out
        self._listener = listener
        self._state = state

    async def check(self, conn: Connection, worker: int, *, poll: bool = False) -> Checked:
        """Promote due tasks and set the timer for the next. `poll`: look for ready tasks in all queues.

        Otherwise it looks for them in the queues that are full here, if there are any: those tasks are for another
        worker. If no queue is full, it looks in all that aren't paused. A check from the cursor looks for none.

        Its answer is in the State then."""
        clock = asyncio.get_running_loop().time
        state, capacity = self._state, self._capacity
        began = clock()
        paused = self._admission.paused
        free = capacity.now(began, paused).by_queue
        state.due_check_begins()
        queues = [queue for queue in capacity.queues if queue not in paused]
        full = [queue for queue in queues if queue not in free]
        echo = None
        if state.position is not Position.AWAY and state.echo.may_be_sent(began):
            echo = self._listener.new_echo(began)
        from_cursor = not poll and state.due.reads_from_cursor(began)
        asked = [] if from_cursor else full if full and not poll else queues
        cursor = state.due.cursor if from_cursor else None
        found, released, settings = await self._ask(conn, (capacity.queues, asked), echo, cursor)
        state.release_wanted |= released
        await self._admission.note_settings(conn, worker, settings)
        now = clock()
        state.due_checked(found, now, seconds=now - began, from_cursor=from_cursor, full=full, poll=poll)
        return Checked(echo is not None, found.ready or found.promoted > 0)

    async def _ask(
        self, conn: Connection, args: _Args, echo: str | None, cursor: datetime | None
    ) -> tuple[Found, bool, str | None]:
        """Ask, without what PostgreSQL refuses to promote. Returns the answer, whether tasks wait to be released, and
        the settings of the queues."""
        timeout = PROOF_SECONDS if echo else None
        promoted = 0
        row = None
        if not self._left_out:
            row = await unless_refused(
                conn.fetchrow(SQL["check_due"], *args, PROMOTED_AT_ONCE, echo, cursor, timeout=timeout)
            )
        if row is None or row[0] is None:
            if row is not None:
                self._state.claim_wanted = True  # some others may have been made ready
                echo = None  # it is sent
            promoted = await self._left_out.promote(conn, args[0], PROMOTED_AT_ONCE)
            row = await conn.fetchrow(SQL["check_due"], *args, 0, echo, cursor, timeout=timeout)
        assert row is not None
        more, seconds, ready, inserted, released, settings, next_cursor, _ = row
        return Found(promoted + more, seconds, ready, inserted, next_cursor), released, settings
