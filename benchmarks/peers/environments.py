"""Each peer's own environment: .venv.peers/NAME, made from the lock file beside its driver, by hash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from hashlib import sha256
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PEERS = ("graphile-worker", "pg-boss", "pgqueuer", "procrastinate", "oban", "saq", "chancy")
NEEDS = {"oban": (3, 12)}  # of Python, where it is more than notifyq's
PIP = ("-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet", "--no-deps", "--require-hashes")


class NoEnvironment(Exception):
    """It can't be made; says why."""


def driver(name: str) -> list[str]:
    """The command that starts `name`'s driver; makes its environment if it isn't there. Raises NoEnvironment."""
    if name == "notifyq":
        return [sys.executable, str(HERE / name / "driver.py")]
    home = ROOT / ".venv.peers" / name
    node = (HERE / name / "package-lock.json").exists()
    lock = HERE / name / ("package-lock.json" if node else "requirements.txt")
    stamp = home / f".ok-{sha256(lock.read_bytes() + str(home).encode()).hexdigest()[:16]}"
    try:
        if not stamp.exists():
            print(f"setting up .venv.peers/{name}", flush=True)
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            _node(name, home) if node else _python(name, home, lock)
            stamp.touch()
    except (OSError, subprocess.CalledProcessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        raise NoEnvironment(detail.strip()[-500:]) from error
    if not node:
        return [str(home / "bin" / "python"), str(HERE / name / "driver.py")]
    for script in (HERE / name / "driver.mjs", HERE / "kit" / "kit.mjs"):
        shutil.copy(script, home)  # Node looks for packages beside the script
    return ["node", str(home / "driver.mjs")]


def _node(name: str, home: Path) -> None:
    for file in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name / file, home)
    _run("npm", "ci", "--no-audit", "--no-fund", cwd=home)


def _python(name: str, home: Path, lock: Path) -> None:
    _run(_interpreter(NEEDS.get(name, (3, 11))), "-m", "venv", str(home))
    _run(str(home / "bin" / "python"), *PIP, "-r", str(lock))


@cache
def _interpreter(least: tuple[int, int]) -> str:
    """This one, those that PEERS_PYTHON names, or another of the PATH; the first that is new enough."""
    test = f"import sys, venv, ensurepip; sys.exit(sys.version_info < {least})"
    named = os.environ.get("PEERS_PYTHON", "").split()
    for python in (sys.executable, *named, "python3.14", "python3.13", "python3.12"):
        found = shutil.which(python)
        if found and subprocess.run([found, "-c", test], check=False, capture_output=True).returncode == 0:
            return found
    version = ".".join(map(str, least))
    raise NoEnvironment(f"needs Python {version} or newer; name one: make bench-peers PEERS_PYTHON=/path/to/python")


def _run(*command: str, cwd: Path | None = None) -> None:
    subprocess.run(command, cwd=cwd, check=True, capture_output=True, text=True)
