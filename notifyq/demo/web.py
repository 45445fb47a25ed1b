"""The web application: one transaction saves a user and enqueues the mail to that user. Run by uvicorn."""

from __future__ import annotations

import secrets
import uuid
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import asyncpg
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .app import Email, SendForgotPasswordEmail, SendVerificationEmail, User, app


class Form(msgspec.Struct):
    email: Email


@asynccontextmanager
async def lifespan(web: Starlette) -> AsyncGenerator[None, None]:
    async with asyncpg.create_pool() as web.state.pool:  # to where the PG* variables lead
        yield


async def signup(request: Request) -> Response:
    form = msgspec.json.decode(await request.body(), type=Form)
    user = User(id=uuid.uuid4(), email=form.email)
    task = SendVerificationEmail(user=user, verification_key=secrets.token_hex(8))
    try:
        async with request.app.state.pool.acquire() as connection, connection.transaction():
            # One transaction holds both, in either order: the task exists if and only if the user does.
            await app.enqueue(task, conn=connection)
            await connection.execute("INSERT INTO users (id, email) VALUES ($1, $2)", user.id, user.email)
    except asyncpg.UniqueViolationError:
        return JSONResponse({"error": "this address has signed up before"}, 409)
    return JSONResponse({"id": str(user.id)}, 201)


async def forgot_password(request: Request) -> Response:
    form = msgspec.json.decode(await request.body(), type=Form)
    task = SendForgotPasswordEmail(email=form.email, reset_key=secrets.token_hex(8))
    async with request.app.state.pool.acquire() as connection, connection.transaction():
        update = "UPDATE users SET reset_key = $2 WHERE email = $1 RETURNING true"
        if await connection.fetchval(update, form.email, task.reset_key):
            await app.enqueue(task, conn=connection)
    return Response(status_code=202)  # for any address, so that the answer doesn't tell which addresses have signed up


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
