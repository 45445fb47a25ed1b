"""Cancel a task, by its Ref."""

from __future__ import annotations

import asyncpg

from ..database.connection import SQL
from ..errors import DatabaseError
from .pool import AppPool
from .ref import Ref, check_same


async def cancel(pool: AppPool, ref: Ref) -> bool:
    """Cancel a task that hasn't ended, and return whether this call did.

    Raises NotifyqError if the task with this id isn't the Ref's, DatabaseError without the right to cancel.
    """
    try:
        if ref.created_at is None:
            row = await pool.fetchrow("SELECT notifyq.cancel($1)", ref.id)
        elif (row := await pool.fetchrow(SQL["cancel_if_created_at"], ref.id, ref.created_at)) is not None:
            check_same(ref.id, ref.created_at, row["created_at"])
    except asyncpg.InsufficientPrivilegeError as error:
        raise DatabaseError(f"this user may not cancel: {error}; schema.sql ends with the GRANTs") from error
    return row is not None and bool(row[0])
