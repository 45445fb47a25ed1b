"""MODULE:APP: how an app is loaded, and what is said of one that can't be."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from notifyq.cli.load import load_app
from notifyq.errors import ConfigError

from ..helpers.command import Run, Start


def unloadable(spec: str) -> ConfigError:
    with pytest.raises(ConfigError) as raised:
        load_app(spec)
    return raised.value


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mailer", "'mailer' names no app; expected MODULE:APP, such as myproject.tasks:app"),
        ("mailer:", "names no app"),
        (":app", "names no app"),
        ("mailer.py:app", "names no app; expected MODULE:APP, such as myproject.tasks:app; for this file: mailer:app"),
        ("./mailer.py", "for this file: mailer:app"),
        ("a b:c", "names no app"),
        ("maler:app", "there is no module 'maler' for maler:app (in "),
        ("maler:app", "); did you mean 'mailer'?"),
        ("xyzzy:app", "expected MODULE:APP, such as myproject.tasks:app, from this folder or installed"),
        ("package.taks:app", "there is no module 'package.taks'"),
        ("package.taks:app", "did you mean 'package.tasks'?"),
        ("mailer.tasks:app", "there is no module 'mailer.tasks'"),
        ("mailer:ap", "mailer has no 'ap'; did you mean 'app'?"),
        ("mailer:xyzzy", "mailer has no 'xyzzy'; its apps: mailer:app"),
        ("mailer:app.inner", "mailer:app has no 'inner'; its apps: mailer:app"),
        ("mailer:Mail", "mailer:Mail is of type StructMeta; expected a notifyq.App; its apps: mailer:app"),
        ("nothing:app", "nothing has no 'app'; make one there: app = notifyq.App()"),
        ("empty:app", "empty:app has no handlers, so there is nothing to run; decorate one with @app.handler"),
        ("untyped:app", "untyped.py, line 3: handler untyped.f: its first parameter has no type"),
        ("twice:app", "twice.py, line 6: "),
    ],
)  # fmt: skip
def test_an_app_that_cannot_be_loaded(folder: Path, spec: str, says: str) -> None:
    """The message says what is wrong, what was expected, and what may have been meant."""
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").touch()
    (folder / "package" / "tasks.py").touch()
    (folder / "nothing.py").touch()
    (folder / "empty.py").write_text("import notifyq\napp = notifyq.App()")
    (folder / "untyped.py").write_text("import notifyq\napp = notifyq.App()\n@app.handler\nasync def f(task): ...")
    two = "import notifyq\nclass A(notifyq.Task): ...\napp = notifyq.App()\n@app.handler\ndef f(t: A): ...\n"
    (folder / "twice.py").write_text(two + "@app.handler\ndef g(t: A): ...")
    error = unloadable(spec)
    assert says in str(error)
    assert not hasattr(error, "__notes__")


@pytest.mark.parametrize("app", ["await app.run_worker()", "async with app.connect(): ..."])
def test_a_script_without_its_guard(folder: Path, app: str) -> None:
    """It would run in place of the command, without banner and signals."""
    code = "import asyncio, notifyq\napp = notifyq.App()\nclass A(notifyq.Task): ...\n@app.handler\ndef f(t: A): ...\n"
    (folder / "bare.py").write_text(f"{code}async def main():\n    {app}\nasyncio.run(main())\n")
    error = unloadable("bare:app")
    assert str(error).startswith("bare.py, line 7: app.")
    assert str(error).endswith('put what calls it under `if __name__ == "__main__":`')


def test_modules_that_import_each_other(folder: Path) -> None:
    (folder / "one.py").write_text("import two\nimport notifyq\napp = notifyq.App()\n")
    (folder / "two.py").write_text("from one import app\n")
    error = unloadable("one:app")
    assert "put `app = notifyq.App()` in a module of its own that imports none of them" in str(error)


async def test_a_file_that_hides_a_module_of_pythons(run: Run, start: Start, folder: Path) -> None:
    """It isn't a bug in notifyq. The message says so for a name, for what imports it later, and for a package."""
    shutil.copy(folder / "mailer.py", folder / "queue.py")
    program = start("worker queue:app", first="sys.path.remove('')")  # as the installed script has it
    assert await program.end() == 2
    assert "queue.py has the name of Python's own module 'queue'" in program.said
    assert "rename queue.py" in program.said
    (folder / "shop.py").write_text("import colorsys\ncolorsys.rgb_to_hsv\n")
    (folder / "colorsys.py").write_text("")
    (folder / "shop2.py").write_text("from sched import scheduler\n")
    (folder / "sched").mkdir()
    (folder / "sched" / "__init__.py").write_text("")
    for module, file in (("shop", "colorsys.py"), ("shop2", "sched/__init__.py")):
        program = start(f"worker {module}:app")
        assert await program.end() == 2
        assert f"notifyq: {file} has the name of Python's own module" in program.said
        assert "a bug in notifyq" not in program.said
    # What notifyq itself imports later.
    later = "lambda _: (sys.path.insert(0, '.'), __import__('colorsys').rgb_to_hsv)"
    program = start("worker mailer:app", first=f"import notifyq.cli.worker as w; w.load_app = {later}")
    assert await program.end() == 2
    assert "notifyq: colorsys.py has the name of Python's own module 'colorsys', which others need" in program.said
    assert "a bug in notifyq" not in program.said


async def test_an_app_without_handlers_validates(run: Run, dsn: str, db: Any, folder: Path) -> None:
    """A process that only enqueues declares tasks, and has none to run them."""
    (folder / "shop.py").write_text(
        "import notifyq\napp = notifyq.App()\nclass Buy(notifyq.Task, tag='BUY'):\n    unique = True\n    what: str\n"
    )
    first = await run("enqueue BUY --app shop:app", '{"what": "tea"}', dsn=dsn)
    assert (first.code, first.err) == (0, "")
    assert (await run("enqueue BUY --app shop:app", '{"what": "tea"}', dsn=dsn)).out == first.out
    said = await run("enqueue BUY --app shop:app", '{"what": 5}', dsn=dsn)
    assert (said.code, said.out) == (2, "")
    assert "the payload doesn't fit BUY: Expected `str`, got `int`" in said.err
    said = await run("enqueue BYU --app shop:app", '{"what": "tea"}', dsn=dsn)
    assert "no handler takes type 'BYU'; did you mean BUY" in said.err


@pytest.mark.parametrize(
    ("code", "what", "where"),
    [
        ("def f():\n    return 1 / 0\nf()", "ZeroDivisionError: division by zero", "broken.py, line 2"),
        ("import nowhere_to_be_found", "No module named 'nowhere_to_be_found'", "broken.py, line 1"),
        ("import mailer.nowhere", "No module named 'mailer.nowhere'", "broken.py, line 1"),
        ("x = = 1", "SyntaxError: invalid syntax", "broken.py, line 1"),
        ("import sys\nsys.exit(7)", "SystemExit: 7", "broken.py, line 2"),
        ("raise ValueError('a\\nb')", "ValueError: a", "broken.py, line 1"),
    ],
)
def test_an_app_that_fails(folder: Path, code: str, what: str, where: str) -> None:
    """Three lines are notifyq's: what was imported, what failed and where, what to do. Then the app's traceback
    follows, and no more."""
    (folder / "broken.py").write_text(code)
    error = unloadable("broken:app")
    lines = str(error).splitlines()
    assert len(lines) == 3
    assert lines[0] == f"can't import broken (looked for in {folder} first)"
    assert lines[1].startswith(f"it failed at {where}: ")
    assert what in lines[1]
    assert "python -c 'import broken'" in lines[2]
    (trace,) = error.__notes__
    assert 'broken.py", line' in trace
    assert "importlib" not in trace
    assert "load.py" not in trace


async def test_the_traceback_of_a_failing_app_is_shown(run: Run, folder: Path) -> None:
    """It comes after notifyq's lines, as it is."""
    (folder / "broken.py").write_text("1 / 0")
    said = await run("enqueue X --app broken:app")
    lines = said.err.splitlines()
    assert said.code == 2
    assert [line.startswith("notifyq: ") for line in lines[:4]] == [True, True, True, False]
    assert lines[3] == "Traceback (most recent call last):"
    assert lines[-1] == "ZeroDivisionError: division by zero"
