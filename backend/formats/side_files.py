"""What travels along with the weights: tokenizer, generation settings, chat templates, the configuration."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backend.formats.remote_code import remote_code_allowed
from backend.formats.spool import writing

COPIED_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tekken.json",
    "chat_template.jinja", "chat_template.json", "processor_config.json", "preprocessor_config.json",
)  # fmt: skip
TEMPLATE_FOLDERS = ("additional_chat_templates", "chat_templates")


def copy_side_files(source: Path, out: Path) -> None:
    """Copy the files of a model folder that are neither weights nor config.json; its code only where it may be run.

    Raises:
        CheckpointError: If the disk is full.
    """
    templates = [path for folder in TEMPLATE_FOLDERS for path in sorted((source / folder).glob("*.jinja"))]
    code = sorted(source.glob("*.py")) if remote_code_allowed() else []
    for path in [source / name for name in COPIED_FILES] + templates + code:
        if path.is_file():
            target = out / path.relative_to(source)
            with writing(target):
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)


def model_config(source: Path, dtype: str | None, quantization: Mapping[str, Any] | None) -> dict[str, Any]:
    """The config.json of the quantized model.

    Args:
        source: The 16-bit model.
        dtype: Type in which the other tensors are stored; None: as the source says.
        quantization: The `quantization_config`, if any Linear is quantized.
    """
    config: dict[str, Any] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if dtype:
        config["dtype"] = dtype
        for part in (config, *(value for value in config.values() if isinstance(value, dict))):
            if part.pop("torch_dtype", None) is not None or "dtype" in part:  # torch_dtype: the older name
                part["dtype"] = dtype
    if quantization:
        config["quantization_config"] = dict(quantization)
    return config


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file for people and programs, whole or not at all; on the disk when this returns.

    Raises:
        CheckpointError: If the disk is full.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(value, file, indent=2, ensure_ascii=False)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
