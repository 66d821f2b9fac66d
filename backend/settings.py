"""The settings of one home, `<home>/quantdeck.toml`: what its operator allows, and how much of the machine it takes.

Job files say what a job does; they cannot change these. Without the file every setting has its default.
Imports no torch.
"""

from __future__ import annotations

import difflib
import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from backend.errors import ConfigError, ConfigErrors
from backend.paths import Home
from backend.served.address import DEFAULT_URL, base_url
from backend.tensorrt_llm.methods import IMAGE

FILE_NAME = "quantdeck.toml"
MAX_BYTES = 100_000

Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class JobSettings(_Section):
    """`[jobs]`: how jobs run.

    Attributes:
        cpu_slots: Jobs without a GPU that may run at the same time.
        cancel_grace_s: How long a program may take to end, seconds: after SIGINT, then after SIGTERM.
        log_bytes: Size at which a job's log starts a new file.
        log_files: Files of a log that are kept, the current one included.
        line_bytes: Longest line of a log; the rest of it is cut.
        min_free_bytes: A job does not start with less than this free on the disk of its home.
    """

    cpu_slots: int = Field(default=1, ge=1, le=1024)
    cancel_grace_s: tuple[Annotated[Finite, Field(ge=0.0, le=3600.0)], Annotated[Finite, Field(ge=0.0, le=3600.0)]] = (
        30.0,
        15.0,
    )
    log_bytes: int = Field(default=64 * 1024**2, ge=64 * 1024)
    log_files: int = Field(default=4, ge=1, le=100)
    line_bytes: int = Field(default=16 * 1024, ge=256, le=1024**2)
    min_free_bytes: int = Field(default=0, ge=0)


class ModelSettings(_Section):
    """`[models]`: which models may be opened.

    Attributes:
        roots: Folders, beside `<home>/user_data/models`, whose models and texts the web page may use; absolute.
        allow_pickle: Weights stored as pickle may be converted to safetensors by a job.
        allow_remote_code: Jobs with TRUST_REMOTE_CODE may run code that comes with their model.
    """

    roots: tuple[str, ...] = ()
    allow_pickle: bool = False
    allow_remote_code: bool = False

    @field_validator("roots")
    @classmethod
    def _absolute(cls, roots: tuple[str, ...]) -> tuple[str, ...]:
        for root in roots:
            if not root.startswith("/") or "\0" in root or ".." in Path(root).parts:
                raise ValueError(f"each is the absolute path of a folder without '..'; {root!r} is not")
            if root.rstrip("/") == "":
                raise ValueError("the whole file system cannot be a root; name the folders that hold models")
        return roots


class WebSettings(_Section):
    """`[web]`: who may reach the page.

    Attributes:
        origins: Public origins of the page behind a proxy, e.g. `https://quant.example.org`.
        session_hours: How long a login lasts.
        max_upload_bytes: Largest file that the page takes.
    """

    origins: tuple[str, ...] = ()
    session_hours: Finite = Field(default=12.0, gt=0.0, le=24.0 * 365)
    max_upload_bytes: int = Field(default=2_000_000, ge=1, le=10**9)

    @field_validator("origins")
    @classmethod
    def _origin(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            parts = urlsplit(origin)
            try:
                whole = f"{parts.scheme}://{parts.netloc}" == origin and (parts.port or 1) > 0
            except ValueError:
                whole = False
            if parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc or not whole:
                raise ValueError(f"each is scheme://host or scheme://host:port, without a path; {origin!r} is not")
        return tuple(origin.lower() for origin in origins)


class TensorRTLLMRunSettings(_Section):
    """`[tensorrt_llm]`: where TensorRT-LLM is.

    Attributes:
        environment: Absolute folder of a virtual environment with tensorrt_llm; empty if there is none.
        image: Container image that is used without it. It is never pulled.
        docker: Name or absolute path of the docker client.
    """

    environment: str = ""
    image: str = IMAGE
    docker: str = "docker"

    @field_validator("environment")
    @classmethod
    def _absolute(cls, folder: str) -> str:
        if folder and (not folder.startswith("/") or "\0" in folder or ".." in Path(folder).parts):
            raise ValueError("it must be empty or the absolute path of a folder without '..'")
        return folder

    @field_validator("image", "docker")
    @classmethod
    def _no_option(cls, text: str) -> str:
        if not text or text.startswith("-") or not text.isprintable() or " " in text:
            raise ValueError("it must be a name without spaces that does not begin with '-'")
        return text


class ServedSettings(_Section):
    """`[served]`: which model servers may be contacted.

    Attributes:
        urls: Base URLs of OpenAI-compatible servers, e.g. `http://127.0.0.1:8000`. No other address is ever asked.
    """

    urls: tuple[str, ...] = (DEFAULT_URL,)

    @field_validator("urls")
    @classmethod
    def _base(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(base_url(url) for url in urls))


class Settings(_Section):
    """All settings of a home.

    Attributes:
        jobs: How jobs run.
        models: Which models may be opened.
        web: Who may reach the page.
        tensorrt_llm: Where TensorRT-LLM is.
        served: Which model servers may be contacted.
    """

    jobs: JobSettings = JobSettings()
    models: ModelSettings = ModelSettings()
    web: WebSettings = WebSettings()
    tensorrt_llm: TensorRTLLMRunSettings = TensorRTLLMRunSettings()
    served: ServedSettings = ServedSettings()

    @classmethod
    def load(cls, home: Home) -> Settings:
        """The settings of a home; all defaults if it has no `quantdeck.toml`.

        Raises:
            ConfigErrors: With every mistake in the file: its key, what was found, what is allowed.
        """
        path = home.root / FILE_NAME
        found = _read(path)
        try:
            return cls.model_validate(_tuples(found))
        except ValidationError as error:
            rows = [_problem(path, item) for item in error.errors()]
        raise ConfigErrors(rows)

    def model_roots(self, home: Home) -> tuple[Path, ...]:
        """The folders whose models and texts the web page may use, symbolic links resolved.

        Raises:
            ConfigErrors: If one is a circle of links.
        """
        found = []
        for root in (str(home.user_data / "models"), *self.models.roots):
            try:
                found.append(Path(root).resolve())
            except (OSError, RuntimeError) as error:
                message = f"{root} cannot be used ({error}; in {home.root / FILE_NAME})"
                raise ConfigErrors([ConfigError(message, key="models.roots", value=root)]) from None
        return tuple(found)


def _read(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ConfigErrors([ConfigError(f"cannot read {path}: {error.strerror}")]) from None
    if len(raw) > MAX_BYTES:
        raise ConfigErrors([ConfigError(f"{path} has more than {MAX_BYTES} bytes; it is no file of settings")])
    try:
        return tomllib.loads(raw.decode("utf-8-sig").replace("\r\n", "\n"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigErrors([ConfigError(f"{path}, line {line}: not UTF-8 text")]) from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigErrors([ConfigError(f"{path} is not valid TOML: {error}")]) from None


def _tuples(value: Any) -> Any:
    """TOML arrays as tuples, which is what the frozen models hold."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _names() -> Iterator[str]:
    """Every key, dotted."""
    for name, field in Settings.model_fields.items():
        yield name
        for model in (field.annotation, *get_args(field.annotation)):
            if isinstance(model, type) and issubclass(model, BaseModel):
                yield from (f"{name}.{key}" for key in model.model_fields)


_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text in quotes",
    "tuple_type": "a list [...]",
    "model_type": "a section",
    "finite_number": "a finite number",
    "too_long": "a list of two numbers",
    "missing": "a list of two numbers",
}


def _unknown(key: str) -> str:
    """What to say about a key that does not exist: the one that was probably meant, else those that there are."""
    names = list(_names())
    section, _, last = key.rpartition(".")
    beside = [name for name in names if name.rpartition(".")[0] == section]
    elsewhere = [name for name in names if "." in name and name.rpartition(".")[2] == last.lower()]
    meant = elsewhere or difflib.get_close_matches(key.lower(), beside, n=1, cutoff=0.7)
    return f"unknown key; did you mean {meant[0]}?" if meant else f"unknown key; there are {', '.join(beside)}"


def _problem(path: Path, item: Any) -> ConfigError:
    """One mistake in words."""
    key = ".".join(str(part) for part in item["loc"])
    kind, context, found = item["type"], item.get("ctx", {}), item.get("input")
    shown = _shown(found)
    if kind == "extra_forbidden":
        text = _unknown(key)
    elif kind in _WANTED:
        text = f"found {shown}; it must be {_WANTED[kind]}"
    elif kind in ("greater_than_equal", "less_than_equal", "greater_than", "less_than"):
        word = {"ge": "at least", "le": "at most", "gt": "more than", "lt": "less than"}
        bound = next(iter(context))
        text = f"found {shown}; it must be {word[bound]} {_shown(context[bound])}"
    elif kind == "value_error":
        text = f"found {shown}; {context['error']}"
    else:
        text = f"found {shown}; {item['msg']}"
    return ConfigError(f"{text} (in {path})", key=key, value=found)


def _shown(value: Any) -> str:
    """A value as TOML writes it, cut to one short line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value) and value == int(value) and abs(value) < 1e15:
        return str(int(value))
    if isinstance(value, tuple):
        return f"[{', '.join(_shown(item) for item in value)}]"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
