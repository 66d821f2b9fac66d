"""The program that asks the Hub, through huggingface_hub: one question, one answer, then it ends.

Run as `python -m backend.sources.hub_worker` by `backend.sources.hub`, with the question as JSON on standard input and
the answer on standard output. A program of its own, since only a program can be ended in the middle of a request that
hangs, and since huggingface_hub reads its settings (`HF_ENDPOINT`, the token) once. It fetches config.json and the
headers of the weight files, never weights.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backend.errors import CheckpointError, ModelError, QuantdeckError
from backend.formats.config import ADAPTER_FILE, CONFIG_BYTES, refuse_code
from backend.formats.headers import INDEX_FILE, PICKLE_SUFFIXES, SINGLE_FILE, TensorInfo, described
from backend.sources.hub_errors import HubUnreachable, hub_error
from backend.sources.models import WANTED_FILES, facts_of
from backend.sources.quick_check import check_config, check_tensors

REQUEST_S = 10.0
MEMORY_BYTES = 4 * 2**30  # an answer that never ends must not take the machine's memory
SEARCHED = ("config", "downloads", "gated", "lastModified", "likes", "pipeline_tag", "safetensors", "tags")
LONGEST_TEXT = 200
# What is told beyond the facts is kept in the page's memory: of models of a size that is sound, and no more.
TOLD_CONFIG_BYTES, TOLD_TENSORS = 200_000, 20_000


def search(question: Mapping[str, Any]) -> dict[str, Any]:
    """Text-generation models whose name holds the asked words, the most downloaded first."""
    from huggingface_hub import HfApi

    found = HfApi().list_models(
        search=question["text"], pipeline_tag="text-generation", sort="downloads", limit=question["limit"],
        expand=list(SEARCHED),
    )  # fmt: skip
    rows = []
    for model in found:
        config = model.config if isinstance(model.config, dict) else {}
        rows.append({**_about(model), "architecture": _architecture(config), "refused": _refused(model.id, config)})
    return {"models": rows}


def inspect(question: Mapping[str, Any]) -> dict[str, Any]:
    """What one model is, and whether it can be quantized."""
    from huggingface_hub import HfApi

    api, name = HfApi(), question["id"]
    model = api.model_info(name, revision=question["revision"], timeout=REQUEST_S, files_metadata=True)
    files = {sibling.rfilename for sibling in model.siblings or []}
    if not model.sha:
        raise ValueError("the answer names no commit")
    answer: dict[str, Any] = {
        **_about(model), "commit": _text(model.sha), "facts": None, "refused": None, "pickle": False,
        "config": None, "tensors": None, "download_bytes": _download_bytes(model.siblings or []),
    }  # fmt: skip
    try:
        config = _config(name, model.sha, files)
        answer["architecture"] = _architecture(config)
        tensors = _tensors(api, name, model.sha, files)
        answer["facts"] = asdict(facts_of(config, tensors))
        if ADAPTER_FILE in files:
            raise ModelError(f"{name} is an adapter for another model; merge the two and give the merged model")
        check_config(name, config)
        check_tensors(name, config, tensors)
        if len(json.dumps(config)) <= TOLD_CONFIG_BYTES and len(tensors) <= TOLD_TENSORS:
            answer |= {"config": config, "tensors": [[t.name, t.dtype, t.shape, t.file, t.nbytes] for t in tensors]}
        refuse_code(Path(name, "config.json"), config)
    except (ModelError, CheckpointError) as error:
        if isinstance(error, HubUnreachable):
            raise
        answer["refused"] = error.message
        answer["pickle"] = isinstance(error, OnlyPicklesError)
    return answer


class OnlyPicklesError(ModelError):
    """The model has weights, but none that can be read without running code."""


def _download_bytes(siblings: Sequence[Any]) -> int | None:
    """Bytes of the files that a job downloads; None where the Hub does not tell the size of one."""
    from huggingface_hub.utils import filter_repo_objects

    sizes = {file.rfilename: file.size for file in siblings}
    wanted = [sizes[name] for name in filter_repo_objects(sizes, allow_patterns=WANTED_FILES)]
    whole = [size for size in wanted if type(size) is int and size >= 0]
    return sum(whole) if whole and len(whole) == len(wanted) else None


def _about(model: Any) -> dict[str, Any]:
    """What a model's entry on the Hub tells, as far as it is told."""
    tags = [tag for tag in model.tags or [] if isinstance(tag, str)]
    licence = next((tag.removeprefix("license:") for tag in tags if tag.startswith("license:")), None)
    parameters = getattr(model.safetensors, "total", None)
    return {
        "id": str(model.id),
        "downloads": _whole(model.downloads),
        "likes": _whole(model.likes),
        "gated": bool(model.gated),
        "licence": _text(licence),
        "parameters": _whole(parameters),
        "updated": model.last_modified.date().isoformat() if model.last_modified else None,
        "kind": _text(model.pipeline_tag),
    }


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value >= 0 else None


def _text(value: Any) -> str | None:
    return value[:LONGEST_TEXT] if isinstance(value, str) and value else None


def _architecture(config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    return _text(names[0]) if isinstance(names, list) and names else None


def _refused(name: str, config: Mapping[str, Any]) -> str | None:
    """Why a model cannot be quantized, as far as the part of its config.json tells that lists of models have."""
    try:
        check_config(name, config)
    except (QuantdeckError, TypeError, KeyError, IndexError) as error:
        return error.message if isinstance(error, QuantdeckError) else None
    return None


def _config(name: str, commit: str, files: set[str]) -> dict[str, Any]:
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    if "config.json" not in files:
        raise ModelError(f"{name} has no config.json; choose a transformers model")
    about = get_hf_file_metadata(hf_hub_url(name, "config.json", revision=commit), timeout=REQUEST_S)
    if about.size is None or about.size > CONFIG_BYTES:
        raise ModelError(f"the config.json of {name} has {about.size} bytes; at most {CONFIG_BYTES} are read")
    try:
        text = Path(hf_hub_download(name, "config.json", revision=commit)).read_text(encoding="utf-8-sig")
        config = json.loads(text)
    except (ValueError, RecursionError):
        raise ModelError(f"the config.json of {name} is not readable JSON; choose another model") from None
    if not isinstance(config, dict):
        raise ModelError(f"the config.json of {name} holds no JSON object; choose another model")
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise ModelError(f"the config.json of {name} sets architectures to {str(names)[:80]!r}; a list is expected")
    return config


def _tensors(api: Any, name: str, commit: str, files: set[str]) -> list[TensorInfo]:
    """Every tensor of a model, from the headers of its weight files, which are read by ranges of bytes."""
    from huggingface_hub.errors import SafetensorsParsingError

    if not {SINGLE_FILE, INDEX_FILE} & files:
        if any(Path(file).suffix in PICKLE_SUFFIXES for file in files):
            raise OnlyPicklesError(
                f"{name} holds its weights only as pickle, which can run code when it is opened; the operator can "
                "allow its conversion ([models] allow_pickle in quantdeck.toml), or choose a model with "
                "safetensors files"
            )
        raise ModelError(f"{name} has no {SINGLE_FILE} and no {INDEX_FILE}; choose a model with safetensors files")
    try:
        found = api.get_safetensors_metadata(name, revision=commit, timeout=REQUEST_S)
    except (
        SafetensorsParsingError,
        AttributeError,
        KeyError,
        TypeError,
        RecursionError,
    ) as error:
        # JSON that is no header makes the parser stumble.
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"a weight file of {name} is broken ({reason}); choose another model") from None
    tensors: list[TensorInfo] = []
    for file, metadata in sorted(found.files_metadata.items()):
        entries = {
            tensor: {"dtype": one.dtype, "shape": list(one.shape), "data_offsets": list(one.data_offsets)}
            for tensor, one in metadata.tensors.items()
        }
        tensors += described(f"{name}/{file}", entries)
    return tensors


QUESTIONS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {"search": search, "inspect": inspect}


def main() -> None:
    """Answer the question on standard input."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    question = json.load(sys.stdin)
    try:
        answer = QUESTIONS[question["ask"]](question)
    except Exception as error:  # whatever came over the network: it ends as a sentence, never as a trace
        told = hub_error(error, question.get("id", ""), question.get("revision"))
        answer = {"error": told.message, "unreachable": isinstance(told, HubUnreachable)}
    json.dump(answer, answers)
    answers.close()


if __name__ == "__main__":
    main()
