"""Whether the tables of options agree with a TensorRT-LLM that is there: an image or an installed package.

Its sources are read, not run, so this needs neither its libraries nor a GPU.

    python -m backend.tensorrt_llm.contract [--image IMAGE | --package FOLDER]

Exit code 0 if they agree, 1 with one line per difference if not, 2 if the sources cannot be had.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from backend.errors import EngineError
from backend.tensorrt_llm.flags import BUILD, LATENCY, SERVE, TABLES, THROUGHPUT, Flag
from backend.tensorrt_llm.methods import IMAGE, LEGACY_VERSION

IMAGE_PACKAGE = "/usr/local/lib/python3.12/dist-packages/tensorrt_llm"
DOCKER_S = 600.0
SOURCES = {
    THROUGHPUT: (("commands/bench.py", "main"), ("bench/benchmark/throughput.py", "throughput_command")),
    LATENCY: (("commands/bench.py", "main"), ("bench/benchmark/low_latency.py", "latency_command")),
    SERVE: (("commands/serve.py", "serve"),),
    BUILD: (("commands/build.py", "parse_arguments"), ("plugin/plugin.py", "PluginConfig")),
}
"""Tool -> its files, each with the function that takes, or the class that holds, its options."""


@dataclass(frozen=True)
class Option:
    """An option as a source defines it.

    Attributes:
        name: With its dashes.
        switch: Whether it takes no value; None if the source does not say.
        choices: Its values; None if it takes any, or they are computed.
    """

    name: str
    switch: bool | None = False
    choices: tuple[str, ...] | None = None


def scan(source: str, owner: str) -> dict[str, Option]:
    """The options in a source that click, click_option_group or argparse reads, or fields of a class of settings.

    Args:
        source: Python.
        owner: Name of the function that is decorated with them or adds them, or of the class.

    Returns:
        Name -> option, one for each spelling.
    """
    found: dict[str, Option] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef) and node.name == owner:
            found.update({option.name: option for option in _fields(node)})
        elif isinstance(node, ast.FunctionDef) and node.name == owner:
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and getattr(call.func, "attr", "") in ("option", "add_argument"):
                    found.update({option.name: option for option in _option(call)})
    return found


def _fields(node: ast.ClassDef) -> Iterator[Option]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            yield Option(f"--{line.target.id.lstrip('_')}", switch=None)


def _option(call: ast.Call) -> Iterator[Option]:
    keywords = {keyword.arg: keyword.value for keyword in call.keywords}
    is_flag, action = (_literal(keywords.get(key)) for key in ("is_flag", "action"))
    choices = _literal(keywords.get("choices"))
    kind = keywords.get("type")
    if isinstance(kind, ast.Call) and _name(kind.func).startswith("Choice") and kind.args:
        choices = _literal(kind.args[0])
    known = tuple(choices) if isinstance(choices, list | tuple) and all(isinstance(c, str) for c in choices) else None
    about = Option("", bool(is_flag) or action in ("store_true", "store_false"), known)
    for word in map(_literal, call.args):
        if isinstance(word, str) and word.startswith("--"):
            yield replace(about, name=word)


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _literal(node: ast.expr | None) -> object:
    """A constant's value; None if it is computed."""
    try:
        return ast.literal_eval(node) if node is not None else None
    except ValueError:
        return None


def differences(package: Path, version: str = LEGACY_VERSION) -> list[str]:
    """What the tables say and the sources do not, one line each.

    Args:
        package: Folder of `tensorrt_llm`.
        version: Whose tables.

    Raises:
        EngineError: If a source is missing or is no Python.
    """
    lines = []
    for tool, about in TABLES[version].items():
        there: dict[str, Option] = {}
        for file, owner in SOURCES[tool]:
            there.update(_scan_file(package / file, owner))
        for flag in (*about.common.values(), *about.flags.values()):
            if (why := _difference(flag, there.get(flag.name))) is not None:
                lines.append(f"{tool} {flag.name}: {why}")
    return lines


def _scan_file(path: Path, owner: str) -> dict[str, Option]:
    try:
        found = scan(path.read_text(encoding="utf-8"), owner)
    except (OSError, ValueError, SyntaxError) as error:
        raise EngineError(f"{path} cannot be read: {error}; is it the package of TensorRT-LLM?") from error
    if not found:
        raise EngineError(f"{path} defines no options in {owner}; they are elsewhere in this version")
    return found


def _difference(flag: Flag, option: Option | None) -> str | None:
    if option is None:
        return "the source has no such option"
    if option.switch is not None and option.switch != (flag.kind == "flag"):
        return f"the source has it {'without' if option.switch else 'with'} a value"
    if flag.kind == "choice" and option.choices is not None and (gone := set(flag.choices) - set(option.choices)):
        return f"the source does not allow {', '.join(sorted(gone))}; it has {', '.join(option.choices)}"
    return None


def copy_sources(image: str, folder: Path, docker: str = "docker") -> None:
    """Copy the sources out of an image into a folder; nothing of it is run, and nothing is pulled.

    Raises:
        EngineError: If the image is not there or has no such files.
    """
    container = _docker(docker, "create", "--pull", "never", image).strip()
    try:
        for file in sorted({file for files in SOURCES.values() for file, _ in files}):
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            _docker(docker, "cp", f"{container}:{IMAGE_PACKAGE}/{file}", str(folder / file))
    finally:
        _docker(docker, "rm", "--force", container)


def _docker(docker: str, *args: str) -> str:
    try:
        done = subprocess.run(
            [docker, *args], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            timeout=DOCKER_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"{docker} {args[0]} failed: {error}") from error
    if done.returncode != 0:
        raise EngineError(f"{docker} {args[0]} ended with exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def main() -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description="Compares the tables of options with a present TensorRT-LLM.")
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--image", default=IMAGE, help=f"container image (default: {IMAGE})")
    place.add_argument("--package", type=Path, help="folder of an installed tensorrt_llm")
    parser.add_argument("--docker", default="docker", help="docker client")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as copied:
            if options.package is None:
                copy_sources(options.image, Path(copied), options.docker)
            lines = differences(options.package or Path(copied))
    except EngineError as error:
        print(error.message, file=sys.stderr)
        return 2
    print("\n".join(lines) if lines else f"The tables of TensorRT-LLM {LEGACY_VERSION} agree with its sources.")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
