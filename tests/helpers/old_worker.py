"""A worker of the version before the made-up one: the statements of this notifyq, in the shortest of loops.

An error of any statement is an error here, also where the real worker tries again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio

from notifyq.database import connection
from notifyq.database.connection import SQL

LARGE = 1_000_000  # bytes of payload that a claim may return


class OldWorker:
    """It claims, and settles in each way: every seventh task is tried twice, every eleventh is handed back once, every
    thirteenth dies."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._seen: set[int] = set()
        self.settled: list[int] = []  # ids, each time that one ended here
        self.ticks = 0
        self.sleeps = 0

    def has_settled(self, count: int) -> Callable[[], Any]:
        async def ask() -> bool:
            return len(self.settled) >= count

        return ask

    async def run(self, stop: anyio.Event) -> None:
        conn: Any = await connection.connect_worker(self._dsn, "old")
        bell: Any = await connection.connect_worker(self._dsn, "old bell")
        try:
            me: int = await conn.fetchval(SQL["register_worker"], "old:1", ["default"], ["Quick"], [10], 100, 30.0)
            while not stop.is_set():
                claimed = await self._claim_and_settle(conn, me)
                held: list[Any] = [[], []]
                tick = await conn.fetchrow(SQL["send_heartbeat"], me, 0, "ok", *held, ["default"], ["Quick"], False)
                assert (tick["registered"], tick["lost"]) == (True, [])
                self.ticks += 1
                if not claimed:
                    await conn.fetchrow(SQL["check_due"], ["default"], ["default"], 100, None, None)
                    await self._sleep(bell, conn, me)
            assert await conn.fetchval(SQL["hand_back_all"], me, None) == 0
            await conn.execute(SQL["unregister_worker"], me)
        finally:
            conn.terminate()
            bell.terminate()

    async def _claim_and_settle(self, conn: Any, me: int) -> int:
        rows = await conn.fetch(SQL["claim"], me, ["default"], [50], 50, LARGE)
        await self._settle(conn, me, [(row["id"], row["attempts"]) for row in rows])
        return len(rows)

    async def _settle(self, conn: Any, me: int, held: list[tuple[int, int]]) -> None:
        first = [(id, attempt) for id, attempt in held if id not in self._seen]
        self._seen |= {id for id, _ in held}
        back = [one for one in first if one[0] % 11 == 0]
        later = [one for one in first if one[0] % 7 == 0 and one not in back]
        over = [one for one in held if one not in back and one not in later]
        for name, some, rest in (
            ("hand_back", back, []),
            ("retry_later", later, [[0.01] * len(later), [b'{"error": "oh"}'] * len(later)]),
            ("finish", over, [["dead" if id % 13 == 0 else "done" for id, _ in over], [], [], True]),
        ):
            if some:
                args = [[id for id, _ in some], [attempt for _, attempt in some], *rest]
                applied = [row[0] for row in await conn.fetch(SQL[name], me, *args)]
                assert sorted(applied) == sorted(id for id, _ in some), name
                if name == "finish":
                    self.settled += applied

    async def _sleep(self, bell: Any, conn: Any, me: int) -> None:
        """Hold SHARE on the bell for a moment."""
        async with bell.transaction():
            if await bell.fetchval("SELECT notifyq.fall_asleep(100)"):
                self.sleeps += 1
                await self._claim_and_settle(conn, me)
                await anyio.sleep(0.02)
