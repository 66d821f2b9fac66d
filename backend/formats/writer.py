"""Writes a checkpoint folder tensor by tensor, so that no more than one tensor is held in memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backend.errors import CheckpointError, ConfigError
from backend.files import sync_path
from backend.formats.autoawq import VERSIONS, pack, quantization_config
from backend.formats.headers import INDEX_FILE, SINGLE_FILE, encode_header
from backend.formats.size import MAX_SHARD_BYTES
from backend.formats.weight import QuantizedWeight

COPIED_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class CheckpointWriter:
    """Streams tensors into safetensors shards and finishes with the small files of the folder.

    Each shard's data is spooled to a `.part` file as it comes; the shard itself, header first, is made when it
    is full. config.json is written last: a folder without it is an unfinished one.

    Args:
        out_dir: Folder to fill; made if needed.
        source_dir: The 16-bit model, from which tokenizer and configuration are taken.
        version: AutoAWQ layout of quantized Linears, `GEMM` or `GEMV`.
        dtype: Type of the other floating tensors, `float16` or `bfloat16`; None keeps the source's.
        max_shard_bytes: A shard is closed before its data would exceed this.

    Raises:
        ConfigError: If version or dtype is unknown.
    """

    def __init__(
        self,
        out_dir: Path | str,
        source_dir: Path | str,
        *,
        version: str = "GEMM",
        dtype: str | None = "float16",
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        if version not in VERSIONS:
            raise ConfigError(f"found {version!r}; allowed are {' and '.join(VERSIONS)}", key="VERSION", value=version)
        if dtype not in ("float16", "bfloat16", None):
            raise ConfigError(f"found {dtype!r}; allowed are float16 and bfloat16", key="dtype", value=dtype)
        self.out_dir, self.source_dir = Path(out_dir), Path(source_dir)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        self.version = version
        self.dtype: torch.dtype | None = getattr(torch, dtype) if dtype else None
        self._max = max_shard_bytes
        self._quantization: dict[str, Any] | None = None
        self._shards: list[list[str]] = []
        self._names: set[str] = set()
        self._open_shard()

    def storage_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which an unquantized tensor of type `dtype` will be stored."""
        return self.dtype if self.dtype and dtype.is_floating_point else dtype

    def declare_quantization(self, *, bits: int, group_size: int, modules_to_not_convert: Sequence[str]) -> None:
        """Say once what config.json will tell about the Linears that `add_linear` receives."""
        self._quantization = quantization_config(bits, group_size, modules_to_not_convert, self.version)

    def add_linear(self, prefix: str, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        """Pack and store one quantized Linear as `<prefix>.qweight/.qzeros/.scales` and its bias, if any."""
        if bias is not None:
            self.add(f"{prefix}.bias", bias)
        for kind, tensor in pack(weight, self.version).items():
            self._store(f"{prefix}.{kind}", tensor)

    def add(self, name: str, tensor: Tensor, source_dtype: torch.dtype | None = None) -> None:
        """Store one unquantized tensor, cast to the writer's dtype.

        Args:
            name: Its key.
            tensor: Its values.
            source_dtype: Its type in the source, where `tensor` was widened for computing.

        Raises:
            CheckpointError: If a value does not fit into the stored type.
        """
        cast = tensor.to(self.storage_dtype(source_dtype or tensor.dtype))
        if cast.dtype == torch.float16 and tensor.dtype != torch.float16:
            lost = cast.isinf() & tensor.isfinite()
            if bool(lost.any()):
                largest = tensor[lost].abs().max().item()
                raise CheckpointError(
                    f"{name} holds values up to {largest:.4g}, beyond float16's 65504; set dtype: bfloat16."
                )
        self._store(name, cast)

    def _store(self, name: str, tensor: Tensor) -> None:
        if name in self._names:
            raise CheckpointError(f"{name} was stored twice; the source checkpoint names it more than once.")
        data = tensor.detach().cpu().contiguous()
        nbytes = data.numel() * data.element_size()
        if self._at and self._at + nbytes > self._max:
            self._close_shard()
            self._open_shard()
        self._spool.write(data.view(-1).view(torch.uint8).numpy().data)
        self._entries[name] = (DTYPE_NAMES[data.dtype], tuple(data.shape), self._at, self._at + nbytes)
        self._at += nbytes
        self._names.add(name)

    def _open_shard(self) -> None:
        self._entries: dict[str, tuple[str, tuple[int, ...], int, int]] = {}
        self._at = 0
        self._part = self.out_dir / f"shard-{len(self._shards) + 1:05d}.part"
        self._spool = open(self._part, "wb")  # noqa: SIM115 - spans many calls

    def _close_shard(self) -> None:
        self._spool.close()
        path = self.out_dir / f"shard-{len(self._shards) + 1:05d}.safetensors"
        with open(path, "wb") as out, open(self._part, "rb") as data:
            out.write(encode_header(self._entries))
            shutil.copyfileobj(data, out, 2**22)
            _sync(out)
        self._part.unlink()
        self._shards.append(list(self._entries))

    def finish(self) -> Path:
        """Close the last shard, give the files their names, copy the tokenizer, write config.json; fsync all.

        Returns:
            The finished folder.
        """
        self._close_shard()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards, start=1):
            final = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            os.replace(self.out_dir / f"shard-{number:05d}.safetensors", self.out_dir / final)
            weight_map.update(dict.fromkeys(names, final))
        if count > 1:
            total = sum((self.out_dir / name).stat().st_size for name in set(weight_map.values()))
            _write_json(self.out_dir / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for name in COPIED_FILES:
            if (self.source_dir / name).is_file():
                shutil.copyfile(self.source_dir / name, self.out_dir / name)
        _write_json(self.out_dir / "config.json", self._config())
        sync_path(self.out_dir)
        return self.out_dir

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.source_dir / "config.json").read_text(encoding="utf-8"))
        if self.dtype:
            config.pop("torch_dtype", None)  # the older name of the same field
            config["dtype"] = str(self.dtype).removeprefix("torch.")
        if self._quantization:
            config["quantization_config"] = self._quantization
        return config


def _write_json(path: Path, value: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
