"""Reading and writing job files without losing anything.

A `Document` keeps the text it was read from. As long as nothing is changed, `dump()` gives that very text
back; a changed value is set in the ruamel.yaml tree, which keeps comments, key order, quotes and keys that
Quantdeck does not know.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError

from backend.errors import ConfigError, ConfigErrors
from backend.schema.errors import UnreadableFile, config_errors
from backend.schema.job import ALGORITHMS, JobConfig
from backend.schema.json_text import is_json, json_values
from backend.schema.measurement import BenchmarkSettings, CalibrationSettings, EvaluationSettings
from backend.schema.odd_keys import refused_keys, section_at, unknown_keys
from backend.schema.yaml_edit import last_leaf, leaf_at, move_comment_below, node_of
from backend.schema.yaml_lines import keep_lines
from backend.schema.yaml_text import MAX_BYTES, MAX_LINES, Style, check_shape, plain_of, written, yaml_of

PLACEHOLDER = re.compile(r"^([ \t]+)(\.\.\.other params[ \t]*\r?)$", re.MULTILINE)
"""A line of the TensorRT-LLM guide that stands for keys it does not show; it is no YAML and is read as a comment."""

SECTIONS: dict[str, type[BaseModel]] = {
    "CALIBRATION": CalibrationSettings,
    "EVALUATION": EvaluationSettings,
    "BENCHMARK": BenchmarkSettings,
}


class Document:
    """A job file: its text, its YAML tree and the validated `JobConfig`.

    Example:
        >>> document = parse_yaml(open("job.yaml").read())
        >>> document.config.MODEL
        'quantdeck/demo'
    """

    def __init__(self, tree: CommentedMap, text: str | None, places: CommentedMap | None = None) -> None:
        self._tree = tree
        self._text = text  # None once something was changed
        self._original = text
        self._places = tree if places is None else places  # tells the lines
        self._style = Style.of(text or "")
        self._config: JobConfig | None = None

    @property
    def values(self) -> dict[str, Any]:
        """The whole file as plain values, unknown keys included."""
        return plain_of(self._tree)

    def line_of(self, path: Sequence[str]) -> int | None:
        """Where a key stands in the text that was read, lines from 0; None if it does not stand there.

        Args:
            path: Keys from the top; of a list, the numbers of its items.
        """
        node: Any = self._places
        line: int | None = None
        for depth, part in enumerate(path):
            if isinstance(node, CommentedMap) and part in node and part in (node.lc.data or {}):
                line, node = int(node.lc.key(part)[0]), node[part]
            elif isinstance(node, CommentedSeq) and part.isdecimal() and int(part) in (node.lc.data or {}):
                line, node = int(node.lc.item(int(part))[0]), node[int(part)]
            else:
                # What a list's item, or a value that is no section, lacks is told where that stands.
                inside = not isinstance(node, CommentedMap) or any(p.isdecimal() for p in path[:depth])
                return line if inside else None
        return line

    @property
    def config(self) -> JobConfig:
        """The validated settings.

        Raises:
            ConfigErrors: With every problem of the file.
        """
        if self._config is None:
            if refused := list(refused_keys(self.values)):
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
        rows = list(map(str, unknown_keys(values)))
        aqlm = section_at(values, ("llm", "AQLM")) if values.get("ALGORITHM") == "AQLM" else {}
        if "," in str(values.get("CUDA_ID", "")):
            used = "tuning uses them all, everything else the first" if aqlm else "a job uses the first"
            if values.get("ALGORITHM") == "TensorRTLLM":
                used = "TensorRT-LLM runs on them all, everything else on the first"
            rows.append(f"CUDA_ID: several GPUs are listed; {used}")
        trusting = [name for name in aqlm if section_at(aqlm, (name,)).get("trust_remote_code") is True]
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
        if key in node and plain_of(node[key]) == value and type(plain_of(node[key])) is type(value):
            return
        before = leaf_at(node, key) if key in node else last_leaf(node) if depth else None
        node[key] = node_of(value)
        if before is not None:
            move_comment_below(before, leaf_at(node, key))
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
        """The file's text; exactly the text that was read if nothing was changed, else all its other lines."""
        if self._text is None:
            self._text = written(self._tree, self._style)
            if self._original is not None:
                self._text = self._in_its_spelling(self._original, self._text)
        return self._text

    def _in_its_spelling(self, original: str, after: str) -> str:
        before = written(yaml_of().load(_readable(original)), self._style)
        text = keep_lines(original, before, after)
        try:
            same = plain_of(yaml_of().load(_readable(text))) == self.values
        except (YAMLError, ConfigError):
            same = False
        return text if same else after


def parse_file(text: str) -> Document:
    """Read a job file in YAML or JSON; one in JSON is YAML from then on, with the lines of the JSON for messages.

    Raises:
        ConfigError: If it is neither, too large, or not a mapping of keys.
    """
    _check_size(text)
    if not is_json(text):
        return parse_yaml(text)
    try:
        values = json_values(text)
    except UnreadableFile as error:
        try:
            return parse_yaml(text)  # YAML has braces too
        except ConfigError:
            raise error from None
    try:
        places = yaml_of().load(text.removeprefix("\ufeff").replace("\t", " "))  # a bare tab is no value in JSON
    except (YAMLError, ValueError, RecursionError):
        places = None
    document = Document(node_of(values), None, places if isinstance(places, CommentedMap) else CommentedMap())
    document.values  # noqa: B018  as for parse_yaml
    check_shape(_readable(document.dump()))
    return document


def parse_yaml(text: str) -> Document:
    """Read a job file.

    The settings are validated when `Document.config` is first asked for, so a form can show a file
    that still has mistakes.

    Raises:
        ConfigError: If it is not YAML, too large, or not a mapping of keys.
    """
    _check_size(text)
    content = _readable(text)
    try:
        check_shape(content)
        tree = yaml_of().load(content)
    except MarkedYAMLError as error:
        raise _unreadable(error, content) from None
    except ReaderError as error:
        line = content.count("\n", 0, error.position) + 1
        raise UnreadableFile("YAML", "it has a character that text cannot have", "", line) from None
    except (YAMLError, ValueError, TypeError, NotImplementedError, RecursionError) as error:
        problem = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnreadableFile("YAML", problem, text) from None
    if not isinstance(tree, CommentedMap):
        found = "nothing" if tree is None else type(tree).__name__
        raise ConfigError(f"found {found}; a job file is a list of `KEY: value` lines, see examples/")
    document = Document(tree, text)
    document.values  # noqa: B018  refuses tags, non-finite numbers and oversized trees at once
    return document


def _unreadable(error: MarkedYAMLError, content: str) -> UnreadableFile:
    """What the reader complains of, at the line to look at: where a list or text begins that has no end."""
    mark, problem = error.problem_mark, (error.problem or "malformed").splitlines()[0]
    if error.context and (begin := error.context_mark) and begin is not mark:
        problem += f" ({error.context.splitlines()[0]} from line {begin.line + 1} on)"
        if mark is None or not "".join(content.splitlines()[mark.line : mark.line + 1]).strip():
            mark = begin
    return UnreadableFile("YAML", problem, content, *((mark.line + 1, mark.column + 1) if mark else (0, 0)))


def _check_size(text: str) -> None:
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise ConfigError(f"the file has {size} bytes; a job file has at most {MAX_BYTES}")
    if text.count("\n") > MAX_LINES:
        raise ConfigError(f"the file has {text.count(chr(10))} lines; a job file has at most {MAX_LINES}")


def _readable(text: str) -> str:
    """The text as the YAML reader takes it."""
    return PLACEHOLDER.sub(r"\1# \2", text.removeprefix("\ufeff").replace("\r\n", "\n"))


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
    return parse_file(decode_yaml(raw, path))


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
    "ALGORITHMS", "SECTIONS", "ConfigErrors", "Document", "decode_yaml", "new_document", "parse_file", "parse_yaml",
    "read_yaml",
]  # fmt: skip
