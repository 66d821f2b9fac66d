"""The JSON files of a model folder, refused if they could make a loader run foreign code. Imports no torch.

transformers reads more than config.json when it opens a folder, and several of its files can name code to fetch or
to import. All of them are looked at before any loader sees the folder, whatever `trust_remote_code` says: some
releases of transformers ran code that config.json named although it was off.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backend.errors import ModelError
from backend.formats.regular import read_regular
from backend.formats.remote_code import KEY, SETTING, check_own_code, remote_code_allowed

CODE_KEY = re.compile(
    r"auto_map|\w*_implementation_internal|custom_pipelines?|custom_generate|code_revision|trust_remote_code"
    r"|(custom|remote|python|modeling|loader|exec)_code",
    re.IGNORECASE,
)
"""Keys that make transformers, or a package built on it, import code from the model's folder or from a hub."""
OTHER_FILE_KEYS = ("configuration_files", "transformers_weights", "fast_tokenizer_files")
"""Keys that make loaders read another configuration or weight file than the one that was checked."""
KERNEL_KEYS = ("use_kernels", "kernel_config", "hub_kernels")
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
EXPERT_IMPLEMENTATION_KEYS = ("experts_implementation", "_experts_implementation")
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Keys that count the experts of a mixture."""
BUILT_IN_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
BUILT_IN_EXPERTS = (None, "eager", "grouped_mm", "batched_mm")
SIDE_FILES = (
    "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
    "processor_config.json", "preprocessor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "feature_extractor_config.json", "chat_template.json", "model_index.json",
    "modules.json", "config_sentence_transformers.json",
)  # fmt: skip
"""Files besides config.json that loaders take settings from."""
ADAPTER_FILE = "adapter_config.json"
CONFIG_BYTES = 20_000_000
SIDE_FILE_BYTES = 100_000_000  # some tokenizers list every token here


def read_config_json(model_dir: Path | str, *, remote_code: bool | None = None) -> dict[str, Any]:
    """The content of config.json, of a folder in which no file asks for code.

    Args:
        model_dir: The model.
        remote_code: Whether the model may name code of its own folder; None: as this process is allowed to run it.

    Raises:
        ModelError: If it is missing, not a JSON object, or a file of the folder asks for remote code; the message
            names the file and the key.
    """
    folder = Path(model_dir)
    path = folder / "config.json"
    try:
        config = _parse(path, CONFIG_BYTES)
    except FileNotFoundError:
        raise ModelError(f"{model_dir} has no config.json; give the folder of a transformers model.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds {type(config).__name__}; a JSON object is expected.")
    allowed = remote_code_allowed() if remote_code is None else remote_code
    refuse_code(path, config, allowed=allowed)
    _check_side_files(folder, allowed)
    names = config.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
        raise ModelError(f"{path} sets architectures: {str(names)[:80]!r}; a list of class names is expected.")
    return config


def _check_side_files(folder: Path, allowed: bool) -> None:
    """Refuse a folder whose other files ask for code, or that is an adapter: loaders would fetch another model."""
    for name in SIDE_FILES:
        try:
            refuse_code(folder / name, _parse(folder / name, SIDE_FILE_BYTES), allowed=allowed)
        except FileNotFoundError:
            continue
    if (folder / ADAPTER_FILE).exists() or (folder / ADAPTER_FILE).is_symlink():
        raise ModelError(
            f"{folder} holds {ADAPTER_FILE}: it is an adapter for another model, which loaders would fetch by the "
            "name that it gives. Merge the adapter into its model and give the merged one."
        )


def _parse(path: Path, limit: int) -> Any:
    """A JSON file.

    Raises:
        FileNotFoundError: If there is none.
        ModelError: If it is no readable JSON.
    """
    try:
        return json.loads(read_regular(path, limit).decode("utf-8-sig"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not readable JSON ({error}); get the file again.") from None


def refuse_code(path: Path, content: Any, *, allowed: bool = False) -> None:
    """Refuse a file's content if it makes loaders run code or read unchecked files, at any depth.

    Args:
        path: What the message names.
        content: The parsed JSON.
        allowed: Whether it may name code that lies beside it.

    Raises:
        ModelError: Naming the file and the key.
    """
    for key, value in _walk(content):
        if key in OTHER_FILE_KEYS and value:
            raise ModelError(
                f"{path} sets {key}: {str(value)[:80]!r}, which makes loaders read other files than those that were "
                "checked; such models are refused. Take the key out, or get the model from another place."
            )
        if key == KEY and allowed:
            check_own_code(path, value)
        elif _asks_for_code(key, value):
            how = f", or run it with TRUST_REMOTE_CODE: true if the operator sets {SETTING}" if key == KEY else ""
            raise ModelError(
                f"{path} sets {key}: {str(value)[:80]!r}, which makes loaders run code that comes with the model or "
                f"from a hub; such models are refused. Use a model whose architecture is part of transformers{how}."
            )


def _asks_for_code(key: str, value: Any) -> bool:
    if value is None or value is False:
        return False
    if key in ATTENTION_KEYS:
        named = value.values() if isinstance(value, dict) else (value,)
        return any(not isinstance(one, str) or one not in BUILT_IN_ATTENTION for one in named if one is not None)
    if key in EXPERT_IMPLEMENTATION_KEYS:
        return not isinstance(value, str) or value not in BUILT_IN_EXPERTS
    if key in KERNEL_KEYS:
        return True
    return CODE_KEY.fullmatch(key) is not None


def _walk(value: Any) -> Iterator[tuple[str, Any]]:
    """All (key, value) pairs, nested ones too."""
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield from item.items()
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)
