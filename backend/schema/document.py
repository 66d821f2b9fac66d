"""Reading and writing job files without losing anything.

A `Document` keeps the text it was read from. As long as nothing is changed, `dump()` gives that very text
back; a changed value is set in the ruamel.yaml tree, which keeps comments, key order, quotes and keys that
Quantdeck does not know.
"""

from __future__ import annotations

import difflib
import io
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent
from ruamel.yaml.reader import ReaderError
from ruamel.yaml.representer import RoundTripRepresenter
from ruamel.yaml.scalarstring import DoubleQuotedScalarString
from ruamel.yaml.tokens import CommentToken

from backend.errors import ConfigError, ConfigErrors
from backend.schema.errors import config_errors
from backend.schema.fields import sections
from backend.schema.job import ALGORITHMS, JobConfig
from backend.schema.measurement import BenchmarkSettings, CalibrationSettings, EvaluationSettings

# A job file has some hundred values. The limits keep the worst file below a second of the reader's time.
MAX_BYTES = 250_000
MAX_LINES = 10_000
MAX_DEPTH = 20
MAX_NODES = 5_000
MAX_ALIASES = 50

_NOT_FOR_JOBS = re.compile(
    r"(LD|DYLD|PYTHON|HF|HUGGING_?FACE|TRANSFORMERS|TORCH|NVIDIA|QUANTDECK)_\w+|\w*_PROXY|(\w+_)?(ENDPOINT|BASE_URL)"
    r"|PYTHON(PATH|HOME|STARTUP)|CUDA_VISIBLE_DEVICES|PATH|HOME|SHELL|ENV|ENVIRONMENT|ENV_VARS|INCLUDE_PATH",
    re.IGNORECASE,
)
"""Keys that would change the environment of the programs that a job runs, or where they download from."""
_CODE_SWITCHES = re.compile(r"(TRUST|ALLOW)_REMOTE_CODE|CONFIRM_RUN_UNSAFE_CODE|ALLOW_PICKLE", re.IGNORECASE)
"""Keys that would let files from elsewhere run code, if they are switched on."""
_WITHOUT_EFFECT = re.compile(r"llm\.AQLM\.(calibration|conversion|finetune)_config\.trust_remote_code")
"""Such keys that the AQLM guide's file has; they are taken and change nothing."""

_PLACEHOLDER = re.compile(r"^([ \t]+)(\.\.\.other params[ \t]*\r?)$", re.MULTILINE)
"""A line of the TensorRT-LLM guide that stands for keys it does not show; it is no YAML and is read as a comment."""

SECTIONS: dict[str, type[BaseModel]] = {
    "CALIBRATION": CalibrationSettings,
    "EVALUATION": EvaluationSettings,
    "BENCHMARK": BenchmarkSettings,
}


@dataclass(frozen=True)
class _Style:
    """How a file spells booleans and empty values: `True` and nothing in the AWQ guide, `true` and `null` elsewhere."""

    lower: bool = False
    null: bool = False

    @classmethod
    def of(cls, text: str) -> _Style:
        """The spelling that a file has."""
        lower, upper = (len(re.findall(rf": +({words})\b", text)) for words in ("true|false", "True|False"))
        return cls(lower > upper, re.search(r": +null\b", text) is not None)


@cache
def _representer(style: _Style) -> type[RoundTripRepresenter]:
    class Representer(RoundTripRepresenter):
        """Writes booleans and empty values the way a file does."""

    true, false = ("true", "false") if style.lower else ("True", "False")
    words = {True: true, False: false}
    Representer.add_representer(bool, lambda rep, v: rep.represent_scalar("tag:yaml.org,2002:bool", words[v]))
    null = "null" if style.null else ""
    Representer.add_representer(type(None), lambda rep, _: rep.represent_scalar("tag:yaml.org,2002:null", null))
    return Representer


def _yaml(style: _Style | None = None) -> YAML:
    yaml = YAML(typ="rt", pure=True)
    yaml.Representer = _representer(style or _Style())
    yaml.preserve_quotes = True
    yaml.width = 4096  # long FORMAT_STRINGs stay on their line
    return yaml


def _plain(node: Any, path: str = "", depth: int = 0, budget: list[int] | None = None) -> Any:
    """A ruamel tree as plain dicts, lists and scalars, with limits against hostile files.

    Aliases are expanded while being counted, so nested aliases cannot blow up memory.
    """
    budget = [MAX_NODES] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0 or depth > MAX_DEPTH:
        raise ConfigError(
            f"the file has more than {MAX_NODES} values or is nested deeper than {MAX_DEPTH} levels", key=path
        )
    tag = getattr(node, "tag", None)
    if tag is not None and tag.value is not None:
        raise ConfigError(f"found a value tagged {tag.value}; only plain YAML is read", key=path)
    if isinstance(node, Mapping):
        plain: dict[str, Any] = {}
        for key, value in node.items():
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise ConfigError("found a key that is no plain word; keys are text", key=path)
            name = str(key)
            if name in plain:
                raise ConfigError(f"found the key {name} twice", key=path)
            plain[name] = _plain(value, f"{path}.{name}".lstrip("."), depth + 1, budget)
        return plain
    if isinstance(node, list):
        return [_plain(v, f"{path}[{i}]", depth + 1, budget) for i, v in enumerate(node)]
    if isinstance(node, bool) or node is None:
        return node
    if isinstance(node, int):
        return int(node)
    if isinstance(node, float):
        if not math.isfinite(node):
            raise ConfigError(f"found {node}; it must be a finite number", key=path, value=float(node))
        return float(node)
    if isinstance(node, str):
        return str(node)
    raise ConfigError(f"found a value of kind {type(node).__name__}; only plain YAML is read", key=path)


def _refused_keys(values: Any, path: str = "") -> Iterator[ConfigError]:
    """Keys that a job file may not have: they ask for what only the operator of the machine decides."""
    if isinstance(values, list):
        for number, value in enumerate(values):
            yield from _refused_keys(value, f"{path}.{number}")
    if not isinstance(values, Mapping):
        return
    for key, value in values.items():
        place = f"{path}.{key}".lstrip(".")
        if _NOT_FOR_JOBS.fullmatch(key):
            text = "a job file cannot set environment variables or addresses; the operator sets them where it starts"
            yield ConfigError(f"{text} Quantdeck", key=place, value=value)
        elif _WITHOUT_EFFECT.fullmatch(place):
            continue
        elif _CODE_SWITCHES.fullmatch(key) and place != "TRUST_REMOTE_CODE" and value not in (False, None, "", 0):
            text = "runs code that comes with a model only with TRUST_REMOTE_CODE: true at the top of the file"
            if "pickle" in key.lower():
                text = "takes pickle files only if quantdeck.toml allows it ([models] allow_pickle); take this key out"
            yield ConfigError(f"found {value!r}; Quantdeck {text}", key=place, value=value)
        else:
            yield from _refused_keys(value, place)


def _unknown_keys(values: Mapping[str, Any]) -> Iterator[str]:
    """Warnings for keys that are kept but have no effect, with the key that was probably meant."""
    models: list[tuple[tuple[str, ...], type[BaseModel]]] = [((), JobConfig)]
    for path, model in (*(((n,), m) for n, m in SECTIONS.items()), *((("llm", n), m) for n, m in ALGORITHMS.items())):
        models += sections(model, path)
    for path, model in models:
        known = list(model.model_fields)
        for key in _at(values, path):
            if key in known:
                continue
            by_lower = {k.lower(): k for k in known}
            near = difflib.get_close_matches(key.lower(), by_lower, n=1, cutoff=0.8)
            hint = f"; did you mean {by_lower[near[0]]}?" if near else ""
            yield f"{'.'.join((*path, key))}: unknown key, kept in the file without effect{hint}"


def _at(values: Any, path: tuple[str, ...]) -> Mapping[str, Any]:
    """The section at a path; empty if there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}


class Document:
    """A job file: its text, its YAML tree and the validated `JobConfig`.

    Example:
        >>> document = parse_yaml(open("job.yaml").read())
        >>> document.config.MODEL
        'quantdeck/demo'
    """

    def __init__(self, tree: CommentedMap, text: str | None) -> None:
        self._tree = tree
        self._text = text  # None once something was changed
        self._style = _Style.of(text or "")
        self._config: JobConfig | None = None

    @property
    def values(self) -> dict[str, Any]:
        """The whole file as plain values, unknown keys included."""
        return _plain(self._tree)

    def line_of(self, path: Sequence[str]) -> int | None:
        """Where a key stands in the text that was read, lines from 0; None if it does not stand there."""
        node: Any = self._tree
        for key in path[:-1]:
            node = node.get(key) if isinstance(node, Mapping) else None
        if not isinstance(node, CommentedMap) or path[-1] not in node or path[-1] not in (node.lc.data or {}):
            return None
        return int(node.lc.key(path[-1])[0])

    @property
    def config(self) -> JobConfig:
        """The validated settings.

        Raises:
            ConfigErrors: With every problem of the file.
        """
        if self._config is None:
            if refused := list(_refused_keys(self.values)):
                raise ConfigErrors(refused)
            try:
                self._config = JobConfig.model_validate(self.values)
            except ValidationError as error:
                raise config_errors(error) from None
        return self._config

    @property
    def warnings(self) -> list[str]:
        """What is odd but no error: unknown keys, several GPUs where one is used, switches without effect."""
        values = self.values
        rows = list(_unknown_keys(values))
        aqlm = _at(values, ("llm", "AQLM")) if values.get("ALGORITHM") == "AQLM" else {}
        if "," in str(values.get("CUDA_ID", "")):
            used = "tuning uses them all, everything else the first" if aqlm else "a job uses the first"
            if values.get("ALGORITHM") == "TensorRTLLM":
                used = "TensorRT-LLM runs on them all, everything else on the first"
            rows.append(f"CUDA_ID: several GPUs are listed; {used}")
        trusting = [name for name in aqlm if _at(aqlm, (name,)).get("trust_remote_code") is True]
        if trusting and values.get("TRUST_REMOTE_CODE") is not True:
            places = ", ".join(f"llm.AQLM.{name}.trust_remote_code" for name in trusting)
            rows.append(
                f"{places}: has no effect; code that comes with a model runs only with TRUST_REMOTE_CODE: true at the "
                "top of the file, and if the operator allows it"
            )
        return rows

    def set(self, path: tuple[str, ...], value: Any) -> None:
        """Change one value; everything else keeps its place, comments and quotes.

        Args:
            path: Keys from the top, e.g. `("llm", "AutoAWQ", "W_BIT")`; missing sections are made.
            value: Plain value or list of them; None is written as an empty value.
        """
        node, depth = self._tree, 0
        while depth < len(path) - 1 and isinstance(node.get(path[depth]), CommentedMap):
            node, depth = node[path[depth]], depth + 1
        key = path[depth]
        for missing in reversed(path[depth + 1 :]):
            value = {missing: value}
        if key in node and _plain(node[key]) == value and type(_plain(node[key])) is type(value):
            return
        before = _leaf_at(node, key) if key in node else _last_leaf(node) if depth else None
        node[key] = _node(value)
        if before is not None:
            _move_comment_below(before, _leaf_at(node, key))
        self._text = self._config = None

    def remove(self, path: tuple[str, ...]) -> None:
        """Take a key out, with everything below it; an absent key is no error."""
        node = self._tree
        for key in path[:-1]:
            if not isinstance(node.get(key), CommentedMap):
                return
            node = node[key]
        if path[-1] in node:
            del node[path[-1]]
            self._text = self._config = None

    def dump(self) -> str:
        """The file's text; exactly the text that was read if nothing was changed."""
        if self._text is None:
            stream = io.StringIO()
            _yaml(self._style).dump(self._tree, stream)
            self._text = stream.getvalue()
        return self._text


Leaf = tuple[CommentedMap | CommentedSeq, Any]  # a mapping or sequence and the key or index in it


def _last_leaf(node: CommentedMap | CommentedSeq) -> Leaf | None:
    """What stands last in a section of the file, at any depth."""
    if not node:
        return None
    return _leaf_at(node, list(node)[-1] if isinstance(node, CommentedMap) else len(node) - 1)


def _leaf_at(node: CommentedMap | CommentedSeq, key: Any) -> Leaf:
    """What stands last in a value that is written as lines below its key; else the key itself."""
    child = node[key]
    is_block = isinstance(child, (CommentedMap, CommentedSeq)) and not child.fa.flow_style()
    return (_last_leaf(child) if is_block else None) or (node, key)


def _move_comment_below(before: Leaf, after: Leaf) -> None:
    """Lines below what was last in a section belong to what follows the section, so they go below its new end."""
    if before[0] is after[0] and before[1] == after[1]:
        return
    node, key = before
    place = 2 if isinstance(node, CommentedMap) else 0
    token = node.ca.items.get(key, [None] * 4)[place]
    if token is None or "\n" not in token.value:
        return
    head, _, below = token.value.partition("\n")
    if not below:
        return
    token.value = head + "\n"
    node, key = after
    place = 2 if isinstance(node, CommentedMap) else 0
    node.ca.items[key] = [None] * 4
    node.ca.items[key][place] = CommentToken("\n" + below, token.start_mark, None)


def _node(value: Any) -> Any:
    """A plain value as it is written: text in quotes, a list of plain values on one line, `[4, 3]`."""
    if isinstance(value, str):
        return DoubleQuotedScalarString(value)
    if isinstance(value, Mapping):
        return CommentedMap((key, _node(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        sequence = CommentedSeq(_node(item) for item in value)
        if not any(isinstance(item, (Mapping, list, tuple)) for item in value):
            sequence.fa.set_flow_style()
        return sequence
    return value


def parse_yaml(text: str) -> Document:
    """Read a job file.

    The settings are validated when `Document.config` is first asked for, so a form can show a file
    that still has mistakes.

    Raises:
        ConfigError: If it is not YAML, too large, or not a mapping of keys.
    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise ConfigError(f"the file has {size} bytes; a job file has at most {MAX_BYTES}")
    if text.count("\n") > MAX_LINES:
        raise ConfigError(f"the file has {text.count(chr(10))} lines; a job file has at most {MAX_LINES}")
    content = _PLACEHOLDER.sub(r"\1# \2", text.removeprefix("\ufeff"))
    try:
        _check_shape(content)
        tree = _yaml().load(content)
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = (error.problem or "malformed").splitlines()[0]
        raise ConfigError(f"this is not valid YAML: {where}{problem}") from None
    except ReaderError as error:
        line = content.count("\n", 0, error.position) + 1
        raise ConfigError(f"this is not valid YAML: line {line}: it has a character that text cannot have") from None
    except (YAMLError, ValueError, TypeError, NotImplementedError, RecursionError) as error:
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"this is not valid YAML: {problem}") from None
    if not isinstance(tree, CommentedMap):
        found = "nothing" if tree is None else type(tree).__name__
        raise ConfigError(f"found {found}; a job file is a list of `KEY: value` lines, see examples/")
    document = Document(tree, text)
    document.values  # noqa: B018  refuses tags, non-finite numbers and oversized trees at once
    return document


def _check_shape(text: str) -> None:
    """Refuse a hostile file while it is only a stream of events, before a tree is made of it.

    Raises:
        ConfigError: If it has too many values, levels or aliases; with the line.
    """
    nodes = depth = aliases = 0
    for event in _yaml().parse(io.StringIO(text)):
        if isinstance(event, CollectionEndEvent):
            depth -= 1
            continue
        nodes += isinstance(event, NodeEvent)
        aliases += isinstance(event, AliasEvent)
        depth += isinstance(event, CollectionStartEvent)
        for found, limit, what in (
            (nodes, MAX_NODES, "values"),
            (depth, MAX_DEPTH, "levels"),
            (aliases, MAX_ALIASES, "aliases"),
        ):
            if found > limit:
                line = event.start_mark.line + 1
                raise ConfigError(f"line {line}: the file has more than {limit} {what}, which no job file needs")


def decode_yaml(raw: bytes, name: str = "this file") -> str:
    """The text of a job file's bytes, which have to be UTF-8, with or without a byte order mark.

    Args:
        raw: The file.
        name: What the error calls it.

    Raises:
        ConfigError: If they are not; with the line.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"cannot read {name}: line {line} is not UTF-8 text (byte {error.start}); save it as UTF-8"
        ) from None


def read_yaml(path: str) -> Document:
    """Read a job file from disk.

    Raises:
        ConfigError: If it cannot be read, is not UTF-8, or is not YAML.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:  # never waits for a pipe
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ConfigError(f"cannot read {path}: it is not a file; give the path of a job's YAML file")
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; give the path of a job's YAML file") from None
    except ValueError:  # a NUL in the path
        raise ConfigError(f"cannot read {path!r}; give the path of a job's YAML file") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path} has more than {MAX_BYTES} bytes; a job file has at most that")
    return parse_yaml(decode_yaml(raw, path))


def new_document(values: Mapping[str, Any]) -> Document:
    """A job file made from plain values, e.g. a form's; nested mappings become sections."""
    document = Document(CommentedMap(), None)
    for path, value in _leaves(values):
        document.set(path, value)
    return document


def _leaves(values: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


__all__ = [
    "ALGORITHMS", "SECTIONS", "ConfigErrors", "Document", "decode_yaml", "new_document", "parse_yaml", "read_yaml",
]  # fmt: skip
