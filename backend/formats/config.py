"""config.json of a model folder, refused if it could make a loader run foreign code. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backend.errors import ModelError

# Keys that make transformers import code from the model's folder or from a hub.
CODE_KEYS = ("auto_map", "_attn_implementation_internal", "_experts_implementation_internal", "custom_pipelines")
ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Keys that count the experts of a mixture."""
BUILT_IN_ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flex_attention")


def read_config_json(model_dir: Path | str) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        ModelError: If it is missing, not a JSON object, or asks for remote code.
    """
    path = Path(model_dir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{model_dir} has no config.json; give the folder of a transformers model.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not readable JSON ({error}); get the file again.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds {type(config).__name__}; a JSON object is expected.")
    for key, value in _walk(config):
        if key in CODE_KEYS or (key in ATTENTION_KEYS and value not in BUILT_IN_ATTENTION):
            raise ModelError(
                f"{path} sets {key}: {str(value)[:80]!r}, which makes loaders run code that comes with the model or "
                "from a hub; such models are refused. Use a model whose architecture is part of transformers."
            )
    return config


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
