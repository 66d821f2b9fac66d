"""Writes a checkpoint folder tensor by tensor, so that no more than one tensor is held in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backend.errors import CheckpointError, ConfigError
from backend.files import sync_path
from backend.formats import aqlm, autoawq, compressed_tensors
from backend.formats.additive_weight import AdditiveWeight
from backend.formats.compressed_config import LinearFormat, quantization_config
from backend.formats.headers import INDEX_FILE, read_headers
from backend.formats.layouts import AQLM, AUTOAWQ_GEMM, COMPRESSED_TENSORS, check_layout, refusal, scale_dtype
from backend.formats.side_files import copy_side_files, model_config, write_json
from backend.formats.size import MAX_SHARD_BYTES
from backend.formats.skeleton import build_skeleton, match_tensors, read_config
from backend.formats.spool import ShardSpool
from backend.formats.weight import QuantizedWeight
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.recipe import GROUP_SIZES, PER_CHANNEL, Scheme

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class CheckpointWriter:
    """Streams tensors into safetensors shards and finishes with the small files of the folder.

    config.json is written last: a folder without it is an unfinished one. A killed process can go on: give the state
    of the last `commit` that was kept to `restore` of a new writer, then add what came after it; the finished folder
    is the same, byte for byte. Without `restore`, the first tensor clears what earlier attempts left.

    Args:
        out_dir: Folder to fill; made if needed.
        source_dir: The 16-bit model, from which tokenizer and configuration are taken.
        layout: Of quantized Linears: `autoawq-gemm`, `autoawq-gemv`, `compressed-tensors` or `aqlm`.
        dtype: Type of the other floating tensors, `float16` or `bfloat16`; None keeps the source's.
        group_size: The one group size of an AutoAWQ checkpoint; None: that of the first Linear accepted.
        max_shard_bytes: A shard is closed before its data would exceed this.

    Attributes:
        scale_dtype: Type that the scales of `add_linear` must have: float16; in compressed-tensors, bfloat16 where
            the model is stored in bfloat16 (see `backend.formats.layouts.scale_dtype`).

    Raises:
        ConfigError: If layout or dtype is unknown, or the folders are the same.
        CheckpointError: If the source's weight files are broken.
    """

    def __init__(
        self,
        out_dir: Path | str,
        source_dir: Path | str,
        *,
        layout: str = AUTOAWQ_GEMM,
        dtype: str | None = "float16",
        group_size: int | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        check_layout(layout, dtype)
        self.out_dir, self.source_dir = Path(out_dir), Path(source_dir)
        if self.out_dir.resolve() == self.source_dir.resolve():
            raise ConfigError(f"found {self.out_dir}, the model itself; give another folder", key="out_dir")
        self.out_dir.mkdir(parents=True, exist_ok=True)
        has_weights = any(self.source_dir.glob("*.safetensors"))  # a made-up model has a configuration alone
        headers = read_headers(self.source_dir) if has_weights else []
        self.layout = layout
        self.scale_dtype: torch.dtype = DTYPES[scale_dtype(layout, dtype, headers)]
        self._dtype = dtype
        self._group_size = group_size
        self._max_shard_bytes = max_shard_bytes
        self._sources = {tensor.name: tensor.dtype for tensor in headers}
        self._spool = ShardSpool(self.out_dir, max_shard_bytes)
        self._linears: dict[str, LinearFormat] = {}
        self._additive: dict[str, AdditiveScheme] = {}

    def storage_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The type in which an unquantized tensor of type `dtype` will be stored."""
        return getattr(torch, self._dtype) if self._dtype and dtype.is_floating_point else dtype

    def refusal(self, scheme: Scheme | AdditiveScheme, shape: tuple[int, int]) -> str | None:
        """Why this layout cannot hold a Linear (out, in) quantized in this way; None if it can.

        AutoAWQ has one group size per checkpoint; where the constructor did not set it, the first scheme that is
        accepted does.
        """
        reason = refusal(self.layout, scheme, shape, self._group_size)
        if reason is None and self._group_size is None and isinstance(scheme, Scheme):
            self._group_size = scheme.group_size
        return reason

    def add(self, name: str, tensor: Tensor, source_dtype: torch.dtype | None = None) -> None:
        """Store one unquantized tensor, cast to the writer's dtype.

        Args:
            name: Its key.
            tensor: Its values.
            source_dtype: Its type in the source, where `tensor` was widened for computing; None: what the source's
                files say about this name.

        Raises:
            CheckpointError: If a value does not fit into the stored type, or the disk is full.
        """
        source = source_dtype or DTYPES.get(self._sources.get(name, ""), tensor.dtype)
        cast = tensor.to(self.storage_dtype(source))
        if cast.dtype == torch.float16 and tensor.dtype != torch.float16:
            lost = cast.isinf() & tensor.isfinite()
            if bool(lost.any()):
                largest = tensor[lost].abs().max().item()
                raise CheckpointError(
                    f"{name} holds values up to {largest:.4g}, beyond float16's 65504; set dtype: bfloat16."
                )
        self._store(name, cast)

    def add_linear(self, prefix: str, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        """Pack and store one quantized Linear: its bias, if any, then the parts of its weight.

        Raises:
            CheckpointError: If the layout cannot hold the weight, or its parts contradict each other.
        """
        self._check(prefix, weight)
        if bias is not None:
            self.add(f"{prefix}.bias", bias)
        if self.layout == COMPRESSED_TENSORS:
            tensors = compressed_tensors.pack(weight)
        else:
            tensors = autoawq.pack(weight, self._version)
        for kind, tensor in tensors.items():
            self._store(f"{prefix}.{kind}", tensor)
        groups = weight.scale.shape[1]
        self._linears[prefix] = LinearFormat(weight.bits, weight.symmetric, weight.q.shape[1], groups)

    def add_additive(self, prefix: str, weight: AdditiveWeight, bias: Tensor | None = None) -> None:
        """Store one Linear of codebooks: its bias, if any, then codes, codebooks and scales.

        Args:
            prefix: Name of the Linear.
            weight: Its codes; codebooks and scales are rounded to float16.
            bias: (out,) or None.

        Raises:
            CheckpointError: If the layout is not `aqlm`, the scheme is not that of the Linears before, or codes,
                codebooks or scales cannot be stored.
        """
        scheme = self._checked_scheme(prefix, weight)
        if bias is not None:
            self.add(f"{prefix}.bias", bias)
        for kind, tensor in aqlm.pack(weight).items():
            self._store(f"{prefix}.{kind}", tensor)
        self._additive[prefix] = scheme

    def commit(self) -> dict[str, Any]:
        """Bring everything that was added to the disk.

        Returns:
            The state from which `restore` goes on; JSON values.
        """
        return self._settings() | {
            "group_size": self._group_size,
            "linears": {n: [f.bits, f.symmetric, f.width, f.groups] for n, f in self._linears.items()},
            "additive": {name: asdict(scheme) for name, scheme in self._additive.items()},
            "shards": self._spool.commit(),
        }

    def seal(self) -> None:
        """Assemble the shards that were full at the last commit; to be called when its state is safe."""
        self._spool.seal()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on right after a commit of another writer over the same folder; what came later is dropped.

        Raises:
            CheckpointError: If the state is of a writer with other settings, or the folder lost what was committed.
        """
        for key, value in self._settings().items():
            if state.get(key) != value:
                raise CheckpointError(
                    f"{self.out_dir} was begun with {key} {state.get(key)!r} and cannot be continued with {value!r}; "
                    "remove the folder and start again."
                )
        self._spool.restore(state["shards"])
        self._group_size = state["group_size"]
        self._linears = {name: LinearFormat(*values) for name, values in state["linears"].items()}
        self._additive = {name: AdditiveScheme(**values) for name, values in state.get("additive", {}).items()}

    def finish(self, kept: Mapping[str, str]) -> Path:
        """Complete the shards, copy the tokenizer, write config.json.

        Args:
            kept: Linears of the decoder layers that stayed in 16 bits, with the reason. The Linears outside of the
                layers are found in the module tree.

        Returns:
            The finished folder.
        """
        quantization = self._quantization(kept) if self._linears or self._additive else None
        weight_map = self._spool.finish()
        if len(set(weight_map.values())) > 1:
            index = {"metadata": {"total_size": self._spool.nbytes}, "weight_map": weight_map}
            write_json(self.out_dir / INDEX_FILE, index)
        copy_side_files(self.source_dir, self.out_dir)
        sync_path(self.out_dir)
        write_json(self.out_dir / "config.json", model_config(self.source_dir, self._dtype, quantization))
        sync_path(self.out_dir)
        return self.out_dir

    @property
    def _version(self) -> str:
        return "GEMM" if self.layout == AUTOAWQ_GEMM else "GEMV"

    def _settings(self) -> dict[str, Any]:
        return {"layout": self.layout, "dtype": self._dtype, "max_shard_bytes": self._max_shard_bytes}

    def _check(self, prefix: str, weight: QuantizedWeight) -> None:
        middle = 1 << (weight.bits - 1)
        reason = None
        if self.layout == AQLM:
            reason = "the aqlm layout holds codebooks"
        elif self.layout != COMPRESSED_TENSORS:
            group_size = weight.group_size if weight.group_size in GROUP_SIZES else PER_CHANNEL
            scheme = Scheme(bits=weight.bits, group_size=group_size, symmetric=weight.symmetric)
            reason = self.refusal(scheme, (weight.q.shape[0], weight.q.shape[1]))
        if weight.scale.dtype != self.scale_dtype:
            reason = f"its scales are {weight.scale.dtype}, and {self.layout} stores {self.scale_dtype} here"
        elif not bool(weight.scale.isfinite().all()):
            reason = "its scales are not all finite"
        elif int(weight.q.max()) >= 2 * middle or int(weight.zero.max()) >= 2 * middle:
            reason = f"it has codes or zeros beyond {weight.bits} bits"
        elif weight.symmetric and not bool((weight.zero == middle).all()):
            reason = f"it is called symmetric, but not all zeros are {middle}"
        if reason:
            raise CheckpointError(f"{prefix} cannot be stored: {reason}.")

    def _checked_scheme(self, prefix: str, weight: AdditiveWeight) -> AdditiveScheme:
        K, words, G = weight.codebooks.shape  # noqa: N806
        scheme = AdditiveScheme(K, weight.nbits_per_codebook, G)
        first = next(iter(self._additive.values()), scheme)
        out, groups, count = weight.codes.shape
        stored = weight.stored()
        reason = self.refusal(scheme, (out, groups * G))
        if scheme != first:
            reason = f"it is {scheme.label}, and an AQLM checkpoint has one scheme, here {first.label}"
        elif words != scheme.words or count != K or weight.scales.shape != (out,):
            shapes = tuple(tuple(t.shape) for t in (weight.codes, weight.codebooks, weight.scales))
            reason = f"its codes, codebooks and scales have shapes {shapes}, which do not belong together"
        elif int(weight.codes.min()) < 0 or int(weight.codes.max()) >= words:
            reason = f"it has codes beyond {scheme.nbits_per_codebook} bits"
        elif not bool(stored.codebooks.isfinite().all() and stored.scales.isfinite().all()):
            reason = "its codebooks or scales are not all finite in float16"
        if reason:
            raise CheckpointError(f"{prefix} cannot be stored: {reason}.")
        return scheme

    def _quantization(self, kept: Mapping[str, str]) -> dict[str, Any]:
        """The `quantization_config`, with names as the module tree has them."""
        model = build_skeleton(read_config(self.source_dir), torch.bfloat16)
        places = match_tensors(model, self._sources).stored
        modules = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        stored = {name: places.get(f"{name}.weight", "").removesuffix(".weight") for name in modules}
        named = {prefix: name for name, prefix in stored.items()}
        linears = {named.get(prefix, prefix): linear for prefix, linear in self._linears.items()}
        additive = {named.get(prefix, prefix): scheme for prefix, scheme in self._additive.items()}
        quantized = linears.keys() | additive.keys()
        listed = {named.get(name, name): reason for name, reason in kept.items()}
        wrong = sorted(quantized & listed.keys())
        if wrong:
            raise CheckpointError(f"{wrong[0]} was stored quantized, but is listed as kept: {listed[wrong[0]]}.")
        ignore = [name for name in dict.fromkeys([*modules, *listed]) if name not in quantized]
        if additive:
            return aqlm.quantization_config(next(iter(additive.values())), ignore, additive)
        if self.layout == COMPRESSED_TENSORS:
            return quantization_config(linears, ignore)
        assert self._group_size is not None
        return autoawq.quantization_config(4, self._group_size, ignore, self._version)

    def _store(self, name: str, tensor: Tensor) -> None:
        data = tensor.detach().cpu().contiguous()
        raw = data.view(-1).view(torch.uint8).numpy().data
        self._spool.append(name, DTYPE_NAMES[data.dtype], data.shape, raw)
