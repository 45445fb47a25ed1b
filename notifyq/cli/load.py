"""MODULE:APP: import the app, or say what is wrong with the name or the module. Each error has exit code 2."""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
import traceback
from types import ModuleType
from typing import NoReturn

from notifyq import App
from notifyq.errors import ConfigError, NotifyqError
from notifyq.loading import loading

from .options import did_you_mean

EXAMPLE = "MODULE:APP, such as myproject.tasks:app"
PYTHONS = os.path.dirname(os.__file__) + os.sep  # the folder of Python's own modules
OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the folder of notifyq


def load_app(spec: str, *, to_run: bool = True) -> App:
    """Import the App that `spec` names, with the current folder on sys.path.

    to_run  True: an app without handlers is an error

    Raises ConfigError.
    """
    name, _, path = spec.partition(":")
    is_file = name.endswith(".py") and os.path.exists(name)
    if is_file or not all(part.isidentifier() for part in [*name.split("."), *path.split(".")]):
        cure = f"; for this file: {_dotted(name)}:{path or 'app'}" if is_file else ""
        raise ConfigError(f"{spec!r} names no app; expected {EXAMPLE}{cure}")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    _check_own(name, folder)
    found: object = _import(spec, name)
    for i, part in enumerate(path.split(".")):
        if not hasattr(found, part):
            holder = ":".join(filter(None, [name, ".".join(path.split(".")[:i])]))
            raise ConfigError(f"{holder} has no {part!r}{_other_apps(found, name, part)}")
        found = getattr(found, part)
    if not isinstance(found, App):
        others = _other_apps(sys.modules[name], name, "")
        raise ConfigError(f"{spec} is of type {type(found).__name__}; expected a notifyq.App{others}")
    if to_run and not found.registry.types:
        raise ConfigError(
            f"{spec} has no handlers, so there is nothing to run; decorate one with @{path}.handler, "
            "in this module or one that it imports (an app over several modules: docs/modules.md)"
        )
    return found


def _check_own(name: str, folder: str) -> None:
    """Raise ConfigError if the user's module has the name of a module of Python's own that is loaded already."""
    top = name.partition(".")[0]
    loaded = getattr(sys.modules.get(top), "__file__", None)
    if top in sys.stdlib_module_names and loaded and (own := _file_of(top, folder)) and not _same(loaded, own):
        raise ConfigError(f"{_hides(top, own)}, and that one is loaded already; rename {os.path.relpath(own)}")


def hidden_module(error: BaseException | None) -> str | None:
    """The cure, if the error is caused by a user's file with the name of a module of Python's own; else None."""
    while error is not None:
        name = error.name if isinstance(error, ImportError) else None
        if isinstance(error, AttributeError) and isinstance(error.obj, ModuleType):
            name = error.obj.__name__
        top = (name or "").partition(".")[0]
        if top in sys.stdlib_module_names and (own := _file_of(top, os.getcwd())):
            return f"{_hides(top, own)}, which others need; rename {os.path.relpath(own)}"
        error = error.__cause__ or error.__context__
    return None


def _file_of(name: str, folder: str) -> str | None:
    """The file of the module with this name in a folder; None if there is none."""
    places = (os.path.join(folder, f"{name}.py"), os.path.join(folder, name, "__init__.py"))
    return next((place for place in places if os.path.isfile(place)), None)


def _same(one: str, other: str) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _hides(name: str, file: str) -> str:
    return f"{os.path.relpath(file)} has the name of Python's own module {name!r}"


def _dotted(file: str) -> str:
    return file.removesuffix(".py").removeprefix("./").strip("/").replace("/", ".")


def _other_apps(found: object, name: str, wanted: str) -> str:
    holder = found if isinstance(found, ModuleType) else sys.modules[name]
    names = [key for key, value in vars(holder).items() if isinstance(value, App)]
    if names and not did_you_mean(wanted, names):
        return f"; its apps: {', '.join(f'{name}:{key}' for key in names)}"
    close = did_you_mean(wanted, names or [key for key in vars(holder) if not key.startswith("_")])
    return close or "; make one there: app = notifyq.App()"


def _import(spec: str, name: str) -> ModuleType:
    try:
        with loading():
            return importlib.import_module(name)
    except KeyboardInterrupt:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            _their_failure(name, error)
        parent = error.name.rpartition(".")[0]
        # The modules beside the missing one: in its package, or in this folder.
        places = getattr(sys.modules.get(parent), "__path__", None) if parent else [os.getcwd()]
        known = [".".join(filter(None, [parent, m.name])) for m in pkgutil.iter_modules(places or [])]
        guess = did_you_mean(error.name, known) or f"; expected {EXAMPLE}, from this folder or installed"
        raise ConfigError(f"there is no module {error.name!r} for {spec} (in {os.getcwd()}){guess}") from error
    except BaseException as error:  # SystemExit too: a script without `if __name__ == "__main__":` may raise it
        _their_failure(name, error)


def _their_failure(name: str, error: BaseException) -> NoReturn:
    """Raise ConfigError with three lines: the import; the place and the error; the cure. Its note is the traceback.

    For an error that notifyq itself raised, the place and the error are enough.
    """
    trace = error.__traceback__
    while trace and _is_ours(trace.tb_frame.f_code.co_filename):
        trace = trace.tb_next
    places = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(trace)]
    if isinstance(error, SyntaxError) and error.filename:
        places = [(error.filename, error.lineno)]
    file, line = next((p for p in reversed(places) if not _is_ours(p[0])), (name, None))
    where = f"{os.path.relpath(file)}, line {line}" if line else name
    if isinstance(error, NotifyqError):
        raise ConfigError(f"{where}: {error}") from error
    what = traceback.format_exception_only(error)[-1].strip().splitlines()[0]
    cure = "correct that"
    if "partially initialized module" in what:
        cure = (
            "two modules import each other; put `app = notifyq.App()` in a module of its own that imports none of "
            "them, and have the worker load one that imports all (docs/modules.md)"
        )
    elif isinstance(error, SystemExit):
        cure = 'a module that is run as a script does its work under `if __name__ == "__main__":`'
    elif hidden := hidden_module(error):
        cure = hidden
    failure = ConfigError(
        f"can't import {name} (looked for in {os.getcwd()} first)\n"
        f"it failed at {where}: {what}\n"
        f"{cure}; to see whether it helped: python -c 'import {name}'"
    )
    failure.add_note("".join(traceback.format_exception(type(error), error, trace)).rstrip())
    raise failure from error


def _is_ours(file: str) -> bool:
    """Whether a file is notifyq's or Python's, and not the user's or another package's."""
    pythons = file.startswith(PYTHONS) and "site-packages" not in file
    return pythons or file.startswith((OURS + os.sep, "<frozen "))
