"""The web application: it writes a user and enqueues the mail to them in one transaction. Run by uvicorn."""

from __future__ import annotations

import os
import secrets
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, TypedDict

import asyncpg
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from notifyq.database.connection import dial_for_pool

from .app import QUEUE, Email, SendForgotPasswordEmail, SendVerificationEmail, User, app


class Form(msgspec.Struct):
    email: Email


class State(TypedDict):
    pool: asyncpg.Pool[asyncpg.Record]


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncGenerator[State, None]:
    tables = {"search_path": os.environ.get("DEMO_SCHEMA", "public")}
    connect: dict[str, Any] = {"connect": dial_for_pool}  # unknown to asyncpg's stubs
    async with asyncpg.create_pool(os.environ.get("NOTIFYQ_DSN"), server_settings=tables, **connect) as pool:
        yield {"pool": pool}


async def signup(request: Request) -> Response:
    form = msgspec.json.decode(await request.body(), type=Form)
    user = User(id=uuid.uuid4(), email=form.email)
    task = SendVerificationEmail(user=user, verification_key=secrets.token_hex(8))
    pool: asyncpg.Pool[asyncpg.Record] = request.state.pool
    try:
        async with pool.acquire() as connection, connection.transaction():
            # The task is there when the user is, and not otherwise: the order of the two doesn't matter.
            await app.enqueue(task, queue=QUEUE, conn=connection)
            await connection.execute("INSERT INTO users (id, email) VALUES ($1, $2)", user.id, user.email)
    except asyncpg.UniqueViolationError:
        return JSONResponse({"error": "this address has signed up before"}, 409)
    return JSONResponse({"id": str(user.id)}, 201)


async def forgot_password(request: Request) -> Response:
    form = msgspec.json.decode(await request.body(), type=Form)
    task = SendForgotPasswordEmail(email=form.email, reset_key=secrets.token_hex(8))
    pool: asyncpg.Pool[asyncpg.Record] = request.state.pool
    async with pool.acquire() as connection, connection.transaction():
        update = "UPDATE users SET reset_key = $2 WHERE email = $1 RETURNING true"
        if await connection.fetchval(update, form.email, task.reset_key):
            await app.enqueue(task, queue=QUEUE, conn=connection)
    return Response(status_code=202)  # known or not: who asks must not learn that


async def bad_form(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 422)


web = Starlette(
    routes=[
        Route("/signup", signup, methods=["POST"]),
        Route("/forgot-password", forgot_password, methods=["POST"]),
    ],
    exception_handlers={msgspec.MsgspecError: bad_form},
    lifespan=lifespan,
)
