"""Cancel a task by its Ref."""

from __future__ import annotations

from ..database.connection import SQL
from ..database.errors import translate_errors
from .pool import AppPool
from .ref import Ref, check_same


async def cancel(pool: AppPool, ref: Ref) -> bool:
    """Cancel a task that hasn't ended, and return whether this call did.

    Raises NotifyqError if the task with this id isn't the Ref's, DatabaseError without the right to cancel.
    """
    with translate_errors("cancel"):
        if ref.created_at is None:
            row = await pool.fetchrow("SELECT notifyq.cancel($1)", ref.id)
        elif (row := await pool.fetchrow(SQL["cancel_if_created_at"], ref.id, ref.created_at)) is not None:
            check_same(ref.id, ref.created_at, row["created_at"])
            if row["cancelled"] is None:  # the task is the Ref's, and a test has moved its time
                row = await pool.fetchrow(SQL["cancel_if_created_at"], ref.id, row["created_at"])
    return row is not None and bool(row[0])
