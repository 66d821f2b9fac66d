"""uv, the installer of engine environments: where it is, how it learns pip's settings, what its failures mean.

uv does not read pip's configuration. A machine whose packages come from a mirror or a folder of wheels says so to
pip, once, and expects that to hold for everything; so pip is asked and uv is told.
"""

from __future__ import annotations

import ast
import ctypes
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from backend.errors import EngineError
from backend.process import PR_SET_PDEATHSIG

PIP_SECTIONS = (":env:", "install", "global")  # the first that has a key wins
KEPT_LINES = 12
NOT_FOR_UV = (
    "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "LD_PRELOAD", "LD_LIBRARY_PATH", "CONDA_PREFIX",
    "UV_PYTHON", "UV_PROJECT_ENVIRONMENT",
)  # fmt: skip

Line = Callable[[str], None]
"""Takes one line of progress."""

_ADVICE = (
    (("hash mismatch",), "A file differs from the locked one: check the package mirror, or clear uv's cache."),
    (("no space left", "os error 28"), "The disk is full: free some space and run the command again."),
    (
        ("failed to fetch", "error sending request", "dns error", "timed out", "connection", "not found in the cache"),
        "The packages could not be fetched: check the network or the mirror set in pip's configuration, and run the "
        "command again; what was fetched already is kept.",
    ),
    (
        ("no solution found", "no wheels", "no usable wheels", "no version of", "not found in the package registry"),
        "A locked package is not offered for this machine: check that pip's index has it for this platform and "
        "Python version.",
    ),
    (("failed to build",), "A package that comes as source could not be built: its own error is above."),
)  # fmt: skip


def find_uv() -> str:
    """Path of the uv program.

    Raises:
        EngineError: If it is not installed.
    """
    try:
        from uv import find_uv_bin

        return str(find_uv_bin())
    except (ImportError, FileNotFoundError):
        raise EngineError("uv, which builds engine environments, is not installed; run `make setup`") from None


def pip_settings() -> dict[str, str]:
    """The settings of `pip install`, from environment variables and configuration files; empty without pip."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return parse_pip_config(done.stdout) if done.returncode == 0 else {}


def parse_pip_config(listing: str) -> dict[str, str]:
    """What holds for `pip install`, of the lines `section.key='value'` that `pip config list` prints."""
    found: dict[str, dict[str, str]] = {section: {} for section in PIP_SECTIONS}
    for line in listing.splitlines():
        name, separator, value = line.partition("=")
        section, _, key = name.rpartition(".")
        if separator and section in found:
            found[section][key] = str(ast.literal_eval(value))
    merged: dict[str, str] = {}
    for section in reversed(PIP_SECTIONS):
        merged.update(found[section])
    return merged


def uv_options(settings: Mapping[str, str]) -> list[str]:
    """Pip's settings in the spelling of uv: where packages come from.

    pip takes the best version from all indexes alike; uv would by default take only the first index that knows a
    name. The locked hashes say what is accepted, so all indexes may be asked.
    """
    options: list[str] = []
    if index := settings.get("index-url", "").strip():
        options += ["--index-url", index]
    for index in settings.get("extra-index-url", "").split():
        options += ["--extra-index-url", index]
    if settings.get("extra-index-url", "").split():
        options += ["--index-strategy", "unsafe-best-match"]
    for place in settings.get("find-links", "").split():
        options += ["--find-links", place]
    for host in settings.get("trusted-host", "").split():
        options += ["--allow-insecure-host", host]
    if settings.get("no-index", "").strip().lower() in ("1", "true", "yes", "on"):
        options.append("--no-index")
    return options


def uv_environment(settings: Mapping[str, str]) -> dict[str, str]:
    """The environment uv runs in: ours, less other Python environments, plus pip's certificate, proxy and timeout."""
    environment = {k: v for k, v in os.environ.items() if k not in NOT_FOR_UV}
    if cert := settings.get("cert"):
        environment.setdefault("SSL_CERT_FILE", cert)
    if proxy := settings.get("proxy"):
        environment.setdefault("ALL_PROXY", proxy)
    if timeout := settings.get("timeout") or settings.get("default-timeout"):
        environment.setdefault("UV_HTTP_TIMEOUT", timeout)
    environment.update(NO_COLOR="1", UV_NO_PROGRESS="1")
    return environment


def _die_with(parent: int) -> Callable[[], None]:
    """What a child does before it becomes a program: it asks to be killed when its parent dies.

    A build whose process is killed releases its lock; a uv that went on would write into the next build.
    """
    libc = ctypes.CDLL(None)  # before the fork, where nothing may be loaded

    def before_exec() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return before_exec


def run_lines(
    command: Sequence[str],
    on_line: Line,
    *,
    env: Mapping[str, str],
    cwd: Path,
    what: str,
    keep: int | None = KEPT_LINES,
) -> list[str]:
    """Run a program, passing on what it prints line by line. It is killed when the calling thread ends.

    Args:
        command: Program and arguments.
        on_line: Takes every line.
        env: Its environment.
        cwd: Its working folder.
        what: What it does, for the error: "installing torch".
        keep: How many of the last lines to keep; None keeps all.

    Returns:
        The lines kept.

    Raises:
        EngineError: If it fails, with its last lines and what to do.
    """
    last: deque[str] = deque(maxlen=keep)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        encoding="utf-8", errors="replace", env=dict(env), cwd=cwd,
        preexec_fn=_die_with(os.getpid()),
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line := line.rstrip():
                    last.append(line)
                    on_line(line)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        shown = list(last)[-KEPT_LINES:]
        text = "\n".join(f"  {line}" for line in shown) or "  (nothing was printed)"
        todo = advice("\n".join(shown))
        raise EngineError(f"{what} failed with exit code {process.returncode}. Its last lines:\n{text}\n{todo}")
    return list(last)


def advice(output: str) -> str:
    """What to do about a failed installation, from what uv printed."""
    lowered = output.lower()
    for marks, text in _ADVICE:
        if any(mark in lowered for mark in marks):
            return text
    return "Run the command again after fixing what these lines name; the unfinished environment is not used."
