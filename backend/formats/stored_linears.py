"""How a quantized checkpoint stores its Linears: which tensors stand for one, and the way back to codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from backend.errors import CheckpointError, ModelError
from backend.formats import aqlm, autoawq, compressed_tensors, modelopt, modelopt_layout
from backend.formats.additive_weight import AdditiveWeight
from backend.formats.compressed_config import METHOD, WeightScheme, packed_schemes, scheme_of
from backend.formats.config import read_config_json
from backend.formats.modelopt_linear import ModeloptWeight
from backend.formats.weight import QuantizedWeight
from backend.quantize.aqlm.scheme import AdditiveScheme

METHODS = ("awq", METHOD, aqlm.METHOD, modelopt_layout.METHOD)


class StoredLinears(Protocol):
    """One checkpoint's quantized Linears."""

    @property
    def required(self) -> tuple[str, ...]:
        """Parts of every quantized Linear's name; the first one marks it. `weight` among them: codes have that name."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Parts that a Linear may have."""

    def unpack(
        self, prefix: str, tensors: Mapping[str, Tensor]
    ) -> tuple[QuantizedWeight | AdditiveWeight | ModeloptWeight, Tensor | None]:
        """The weight of a Linear, and the order of inputs (in,) that its columns have, if it is not the model's.

        Raises:
            CheckpointError: If the tensors contradict each other or the configuration.
        """


@dataclass(frozen=True)
class AutoAwqLinears:
    """AutoAWQ: one version and group size for all.

    Attributes:
        version: `GEMM` or `GEMV`.
        group_size: Inputs per group.
    """

    version: str
    group_size: int
    required: tuple[str, ...] = ("qweight", "qzeros", "scales")
    optional: tuple[str, ...] = ()

    def unpack(self, prefix: str, tensors: Mapping[str, Tensor]) -> tuple[QuantizedWeight, Tensor | None]:
        """See `StoredLinears`."""
        return autoawq.unpack(tensors, self.version, self.group_size), None


@dataclass(frozen=True)
class PackQuantizedLinears:
    """compressed-tensors, format pack-quantized: a scheme for each Linear.

    Attributes:
        schemes: The config groups.
    """

    schemes: Sequence[WeightScheme]
    required: tuple[str, ...] = compressed_tensors.REQUIRED
    optional: tuple[str, ...] = compressed_tensors.OPTIONAL

    def unpack(self, prefix: str, tensors: Mapping[str, Tensor]) -> tuple[QuantizedWeight, Tensor | None]:
        """See `StoredLinears`."""
        scheme = scheme_of(prefix, self.schemes)
        if scheme is None:
            raise CheckpointError(f"{prefix} is packed, but no config group of config.json targets it.")
        try:
            weight = compressed_tensors.unpack(tensors, scheme.bits, scheme.group_size)
            g_idx = tensors.get("weight_g_idx")
            if g_idx is None or bool((g_idx < 0).all()):  # -1: the library's mark for "unused"
                return weight, None
            order = compressed_tensors.column_order(g_idx, weight.q.shape[1], weight.scale.shape[1])
        except CheckpointError as error:
            raise CheckpointError(f"{prefix}: {error.message}") from None
        if torch.equal(order, torch.arange(len(order), device=order.device)):
            return weight, None
        return replace(weight, q=weight.q[:, order]), order


@dataclass(frozen=True)
class AqlmLinears:
    """AQLM: one scheme for all.

    Attributes:
        scheme: Of the codebooks.
    """

    scheme: AdditiveScheme
    required: tuple[str, ...] = aqlm.PARTS
    optional: tuple[str, ...] = ()

    def unpack(self, prefix: str, tensors: Mapping[str, Tensor]) -> tuple[AdditiveWeight, Tensor | None]:
        """See `StoredLinears`."""
        try:
            return aqlm.unpack(tensors, self.scheme), None
        except CheckpointError as error:
            raise CheckpointError(f"{prefix}: {error.message}") from None


@dataclass(frozen=True)
class ModeloptLinears:
    """modelopt: one algorithm for all.

    Attributes:
        config: Of the checkpoint.
    """

    config: modelopt.ModeloptConfig
    required: tuple[str, ...] = modelopt_layout.PARTS
    optional: tuple[str, ...] = modelopt_layout.OPTIONAL

    def unpack(self, prefix: str, tensors: Mapping[str, Tensor]) -> tuple[ModeloptWeight, Tensor | None]:
        """See `StoredLinears`."""
        if self.config.ignores(prefix):
            raise CheckpointError(
                f"{prefix} is quantized, but config.json lists it as ignored; export the model again."
            )
        try:
            return modelopt.unpack(tensors, self.config), None
        except CheckpointError as error:
            raise CheckpointError(f"{prefix}: {error.message}") from None


def quantization_of(folder: Path) -> Mapping[str, Any] | None:
    """The `quantization_config` of a folder, of a method that can be loaded; None for a 16-bit model.

    Raises:
        ModelError: If another method made it.
    """
    found = read_config_json(folder).get("quantization_config")
    if found is None:
        return modelopt.older_config(folder)
    method = found.get("quant_method") if isinstance(found, dict) else found
    if not isinstance(found, dict) or method not in METHODS:
        raise ModelError(
            f"{folder} is quantized with {method!r}; 16-bit models, AutoAWQ, compressed-tensors, AQLM and modelopt "
            "checkpoints can be loaded."
        )
    return found


def stored_linears(folder: Path, config: Mapping[str, Any]) -> StoredLinears | None:
    """The reader that a `quantization_config` asks for; None if it is one that we leave to other packages.

    Raises:
        ModelError: If an AutoAWQ, AQLM or modelopt configuration is not one of the known layouts.
        CheckpointError: If a modelopt checkpoint also quantizes what cannot be run here.
    """
    if config.get("quant_method") == METHOD:
        schemes = packed_schemes(config)
        return None if schemes is None else PackQuantizedLinears(schemes)
    if config.get("quant_method") == aqlm.METHOD:
        return AqlmLinears(aqlm.scheme_of(config))
    if config.get("quant_method") == modelopt_layout.METHOD:
        return ModeloptLinears(modelopt.parse_config(folder, config))
    version = str(config.get("version", "gemm")).upper()
    bits, group_size = config.get("bits"), config.get("group_size")
    if version not in autoawq.VERSIONS or bits != 4 or not isinstance(group_size, int) or group_size < 1:
        raise ModelError(
            f"{folder}/config.json: AutoAWQ version {version!r}, bits {bits!r}, group_size {group_size!r}; "
            "supported are GEMM and GEMV with 4 bits and a positive group size."
        )
    return AutoAwqLinears(version, group_size)
