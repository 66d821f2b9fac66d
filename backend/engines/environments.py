"""Environments of engines whose pins clash with ours: built by uv from locked requirements, on demand.

A definition is a folder `environments/<name>/`:

- `environment.toml`: `about`, `kind` (`engine`, or `peer` for benchmarks only), `python`, optional `[variables]`;
- `lock.txt`: everything but torch, every file by its hash; made from `requirements.in`;
- `torch.txt`: torch by version alone, because CPU and CUDA builds of one version are different files;
- `source.txt` (optional): packages that come as source, by hash, built with what is installed, without their
  dependencies;
- `probe.py`: imports the engine and does one small thing with it.

The result lies in `environments/.venvs/<name>-<hash>`, beside the project's own `.venv` and not under a home: it
belongs to the machine and to this version of the project, and jobs of all homes share it. The hash covers the
locked packages, the Python version and the platform, so a changed lock is a new environment. Environments cannot be
moved, hence each is built in place; the file `.ready.json`, written last, tells a finished one from a rest.
Imports no torch.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.engines.uv import Line, find_uv, pip_settings, run_lines, uv_environment, uv_options
from backend.errors import ConfigError, EngineError
from backend.files import write_json
from backend.paths import PROJECT
from backend.process import hold_lock

DEFINITIONS = PROJECT / "environments"
ROOT_VARIABLE = "QUANTDECK_ENVIRONMENTS"
READY = ".ready.json"
HASHED_FILES = ("lock.txt", "torch.txt", "source.txt")
BUILD_WAIT_S = 3600.0  # for another process that builds the same environment

PASSED_VARIABLES = (
    "HOME", "USER", "LOGNAME", "SHELL", "TERM", "TZ", "LANG", "LANGUAGE", "TMPDIR", "PATH",
    "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE",
    "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy",
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "CC", "CXX",
)  # fmt: skip
PASSED_PREFIXES = ("LC_", "XDG_", "CUDA_", "NVIDIA_", "OMP_", "MKL_", "QUANTDECK_")
DOCKER_VARIABLES = ("DOCKER_HOST", "DOCKER_CONTEXT", "DOCKER_CONFIG", "DOCKER_TLS_VERIFY", "DOCKER_CERT_PATH")
"""How docker's client finds its daemon; `DOCKER_AUTH_CONFIG`, which holds passwords, is not among them."""
OWN_PREFIXES = (
    *PASSED_PREFIXES, *DOCKER_VARIABLES, "HF_", "HUGGING_FACE_", "TRANSFORMERS_", "TORCH", "PYTORCH_", "TRITON_",
    "KMP_", "GOMP_", "OPENBLAS_", "DNNL_", "ONEDNN_", "ATEN_", "MALLOC_", "LMEVAL_", "LM_HARNESS_",
)  # fmt: skip
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_SECRET = re.compile("TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(^|_)KEY", re.IGNORECASE)


@dataclass(frozen=True)
class Environment:
    """One engine environment: its definition and its place on this machine.

    Attributes:
        definition: Folder of its locked requirements.
        root: Folder in which environments are installed.
    """

    definition: Path
    root: Path

    @property
    def name(self) -> str:
        """What people call it."""
        return self.definition.name

    @property
    def about(self) -> dict[str, Any]:
        """The content of `environment.toml`."""
        return tomllib.loads((self.definition / "environment.toml").read_text(encoding="utf-8"))

    @property
    def hash(self) -> str:
        """16 hexadecimal digits that change with the locked packages, the Python version and the platform."""
        digest = hashlib.sha256(f"{self.about['python']} {sys.platform} {platform.machine()}".encode())
        for name in HASHED_FILES:
            path = self.definition / name
            digest.update(f"\0{name}\0".encode() + (path.read_bytes() if path.exists() else b"absent"))
        return digest.hexdigest()[:16]

    @property
    def folder(self) -> Path:
        """Where it is, or will be, installed."""
        return self.root / f"{self.name}-{self.hash}"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def ready(self) -> dict[str, Any] | None:
        """What `.ready.json` tells about the finished environment; None if it is absent, half built or broken."""
        if not self.python.exists():
            return None
        try:
            facts = json.loads((self.folder / READY).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return facts if isinstance(facts, dict) and facts.get("hash") == self.hash else None


def environments(definitions: Path | None = None, root: Path | None = None) -> dict[str, Environment]:
    """All environments that are defined, by name.

    Args:
        definitions: Folder of definitions; default: the project's.
        root: Where they are installed; default: `QUANTDECK_ENVIRONMENTS`, else a folder beside the definitions.
    """
    definitions = definitions or DEFINITIONS
    root = root or Path(os.environ.get(ROOT_VARIABLE) or definitions / ".venvs").expanduser().resolve()
    folders = sorted(path.parent for path in definitions.glob("*/environment.toml"))
    return {folder.name: Environment(folder, root) for folder in folders}


def names() -> tuple[str, ...]:
    """The environments that `install` can build."""
    return tuple(environments())


def environment(name: str) -> Environment:
    """The environment of that name.

    Raises:
        ConfigError: If none is defined.
    """
    known = environments()
    if name not in known:
        raise ConfigError(f"no environment is called {name!r}; there are {', '.join(known)}", value=name)
    return known[name]


def environment_python(name: str) -> Path | None:
    """The interpreter of an installed environment, or None if it is not installed."""
    env = environment(name)
    return env.python if env.ready() else None


def missing_reason(name: str) -> str | None:
    """Why the engine in this environment cannot run, or None if it can."""
    if environment(name).ready():
        return None
    return f"engine {name} is not installed; run `python -m backend engines install {name}`"


def environment_variables(name: str, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a program in an environment sees of our environment variables: an allow-list.

    Python's own variables, library paths and tokens stay outside; its own `bin` comes first in PATH.

    Args:
        name: The environment.
        base: Instead of `os.environ`.
    """
    return _variables(environment(name), os.environ if base is None else base)


def own_variables(base: Mapping[str, str] | None = None, *, hub_token: bool = False) -> dict[str, str]:
    """The same for a program that runs with our own Python: what its libraries know is passed as well.

    Args:
        base: Instead of `os.environ`.
        hub_token: Whether the program may see the token for the Hub.
    """
    found = _passed(os.environ if base is None else base, OWN_PREFIXES)
    tokens = {k: v for k, v in (os.environ if base is None else base).items() if k in HUB_TOKENS}
    return {**found, **(tokens if hub_token else {}), "PYTHONNOUSERSITE": "1"}


def _passed(base: Mapping[str, str], prefixes: tuple[str, ...]) -> dict[str, str]:
    """The allowed variables; of those with a prefix none whose name says that it holds a secret."""
    return {
        k: v for k, v in base.items() if k in PASSED_VARIABLES or (k.startswith(prefixes) and not _SECRET.search(k))
    }


def _variables(env: Environment, base: Mapping[str, str]) -> dict[str, str]:
    passed = _passed(base, PASSED_PREFIXES)
    passed["PATH"] = os.pathsep.join([str(env.python.parent), base.get("PATH", os.defpath)])
    passed["PYTHONNOUSERSITE"] = "1"
    return {**passed, **{k: str(v) for k, v in env.about.get("variables", {}).items()}}


def install(name: str, on_line: Line = lambda line: None) -> Path:
    """Build an environment, unless it is there already.

    Safe to call from several processes at once, and after a build that was interrupted.

    Args:
        name: The environment.
        on_line: Takes lines of progress.

    Returns:
        Its interpreter.

    Raises:
        ConfigError: If no environment has that name.
        EngineError: If it cannot be built or its probe fails; the message says what to do.
    """
    return build(environment(name), on_line)


def build(env: Environment, on_line: Line) -> Path:
    """`install` for an environment anywhere."""
    try:
        return _build(env, on_line)
    except OSError as error:
        raise EngineError(
            f"{env.name} could not be built in {env.folder}: {error.strerror or error} ({error.filename or env.root}). "
            "The unfinished environment is not used; run the command again when this is mended"
        ) from None


def _build(env: Environment, on_line: Line) -> Path:
    if env.ready():
        on_line(f"{env.name} is already installed in {env.folder}")
        return env.python
    uv = find_uv()
    with _alone(env, on_line):
        if env.ready():  # the other process finished it
            on_line(f"{env.name} was built by another process in {env.folder}")
            return env.python
        if env.folder.exists():
            on_line(f"an unfinished build is in {env.folder}; starting afresh")
            shutil.rmtree(env.folder)
        settings = pip_settings()
        variables, sources = uv_environment(settings), uv_options(settings)

        def run(what: str, *command: str | Path) -> list[str]:
            # From the project folder, as pip is, so that a relative --find-links means the same.
            return run_lines([str(c) for c in command], on_line, env=variables, cwd=PROJECT, what=what)

        on_line(f"building {env.name} in {env.folder}")
        run("making the environment", uv, "venv", "--no-project", "--python", _interpreter(env), env.folder)
        into: list[str | Path] = [uv, "pip", "install", "--python", env.python, *sources]
        lock, source = env.definition / "lock.txt", env.definition / "source.txt"
        locked = ["--no-deps", "--require-hashes"]
        run("installing the locked packages", *into, *locked, "--only-binary", ":all:", "-r", lock)
        # torch brings what its build needs (a CUDA build: NVIDIA's libraries and triton); the rest stays as locked.
        run("installing torch", *into, "-r", env.definition / "torch.txt", "-c", lock)
        if source.exists():
            run("building from source", *into, *locked, "--no-build-isolation", "-r", source)
        own = _variables(env, os.environ)
        command = [str(env.python), "-I", str(env.definition / "probe.py")]
        run_lines(command, on_line, env=own, cwd=env.root, what=f"trying out {env.name} (its probe.py)")
        freeze = [uv, "pip", "freeze", "--quiet", "--python", str(env.python)]
        packages = run_lines(freeze, lambda _: None, env=variables, cwd=env.root, what="listing packages", keep=None)
        _reach_disk(env.folder)
        write_json(env.folder / READY, {"name": env.name, "hash": env.hash, "packages": packages})
    for other in sorted(env.root.glob(f"{env.name}-*/{READY}")):
        if other.parent != env.folder:
            on_line(f"{other.parent} is of an earlier version; delete it when no job uses it")
    on_line(f"{env.name} is ready: {env.python}")
    return env.python


def _reach_disk(folder: Path) -> None:
    """Have all that was installed reach the disk, so that a power cut cannot leave a marker without its files."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        ctypes.CDLL(None).syncfs(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _alone(env: Environment, on_line: Line) -> Iterator[None]:
    """Hold the environment's build lock; wait if another process has it."""
    path = env.root / f"{env.name}-{env.hash}.lock"
    with contextlib.ExitStack() as stack:
        try:
            if stack.enter_context(hold_lock(path, wait_s=0)) is None:
                on_line(f"another process is building {env.name}; waiting for it")
                if stack.enter_context(hold_lock(path, wait_s=BUILD_WAIT_S)) is None:
                    raise EngineError(f"{env.name} is still being built by another process; try again later")
        except OSError as error:
            raise EngineError(f"{env.root} cannot be written ({error.strerror}); set {ROOT_VARIABLE}") from None
        yield


def _interpreter(env: Environment) -> str:
    """Our own Python if it is of the version that the lock was made for, else that version, for uv to find."""
    wanted = str(env.about["python"])
    return sys.executable if wanted == f"{sys.version_info[0]}.{sys.version_info[1]}" else wanted
