"""Fixtures of the command line's tests: an environment without settings, a folder with an app, and programs there."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..helpers.command import Program


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`notifyq dev` leaves a folder even if it can't start. A test that names none must not use this machine's."""
    for name in list(os.environ):
        if name.startswith(("NOTIFYQ_", "PG", "DATABASE_URL", "XDG_")) and name != "NOTIFYQ_PG_BIN":
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with an app in it."""
    (tmp_path / "mailer.py").write_text(MAILER)
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


MAILER = """
import asyncio, signal, subprocess, time
import notifyq

app = notifyq.App()

class Mail(notifyq.Task, tag="SEND_MAIL"):
    to: str

class Sleep(notifyq.Task, tag="SLEEP"):
    how: str = "well"

class Thread(notifyq.Task, tag="THREAD"):
    pass

@app.handler
async def mail(task: Mail, ctx: notifyq.Context) -> str:
    print("mail", task.to, flush=True)  # first: what it enqueues may run before its enqueue returns
    if task.to == "again":
        await app.enqueue(Mail(to="me"))
    return "sent"

@app.handler
async def sleep(task: Sleep, ctx: notifyq.Context) -> None:
    if task.how == "takes signals":
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, print)
    if task.how == "child":
        child = subprocess.Popen(["sleep", "60"])
        child.terminate()
        print("child ended with", child.wait(), flush=True)
    print("sleeps", task.how, flush=True)
    if task.how == "blocks":
        time.sleep(60)
    await asyncio.sleep(60)

@app.handler
def thread(task: Thread) -> None:
    print("sleeps in a thread", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def start(folder: Path, dsn: str) -> Iterator[Callable[..., Program]]:
    """`start("worker mailer:app")`: killed at the end of the test, if it still runs."""
    programs: list[Program] = []

    def program(words: str, *, at: str = dsn, first: str = "", **environment: str) -> Program:
        programs.append(Program(words, folder, at, first, **environment))
        return programs[-1]

    yield program
    for running in programs:
        if running.popen.poll() is None:
            running.popen.kill()
            running.popen.communicate()
        assert running.popen.stdout
        running.popen.stdout.close()
