"""An app with one nightly cron, and its row."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import notifyq

from .waiting import Seen, eventually

CRON = "SELECT next_at, last_at, paused, recent FROM notifyq.cron WHERE name = 'Nightly'"


class Nightly(notifyq.Task):
    region: str = "eu"


def made(seen: Seen, expression: str = "0 3 * * *", **options: Any) -> notifyq.App:
    app = notifyq.App()

    @app.cron(expression, **options)
    @app.handler
    async def nightly(task: Nightly, ctx: notifyq.Context) -> None:
        seen.add((ctx.id, task.region))

    return app


async def known(db: Any) -> datetime:
    """Wait until the cron's next slot is known. Returns it."""
    await eventually(lambda: db.fetchval("SELECT next_at IS NOT NULL FROM notifyq.cron"))
    found: datetime = (await db.fetchrow(CRON))["next_at"]
    return found
