"""Names, types and shapes of the tensors that nvidia-modelopt exports for a Linear. Imports no torch.

Source: nvidia-modelopt 0.47, its export of unified Hugging Face checkpoints; `backend.formats.modelopt` has the table.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from backend.errors import ConfigError
from backend.formats.layouts import Stored

METHOD = "modelopt"
"""`quant_method` in config.json."""
FP8_ALGO, NVFP4_ALGO, W4A8 = "FP8", "NVFP4", "W4A8_AWQ"
NVFP4_BLOCK = 16
PARTS = ("weight_scale", "weight")
OPTIONAL = ("weight_scale_2", "input_scale", "pre_quant_scale")
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Linears that read one tensor. If a norm gives it, AWQ's factors of these inputs are folded into the norm."""
FIRST_NORM = "input_layernorm.weight"
"""What layers have whose norms come before attention and MLP; Exaone 4's come behind them."""


@dataclass(frozen=True)
class Algorithm:
    """One `quant_algo`.

    Attributes:
        weight: safetensors' type of the codes.
        parts: Scales that every Linear has.
        smoothed: Linears with factors of their inputs: `none`, `all`, or `inner`: all but those `folded` tells.
        grouped: Whether runs of inputs share scales.
    """

    weight: str
    parts: tuple[str, ...]
    smoothed: str = "none"
    grouped: bool = False


ALGORITHMS: Mapping[str, Algorithm] = {
    "W4A16_AWQ": Algorithm("U8", ("weight_scale",), "inner", grouped=True),
    W4A8: Algorithm("U8", ("weight_scale", "weight_scale_2", "input_scale"), "inner", grouped=True),
    FP8_ALGO: Algorithm("F8_E4M3", ("weight_scale", "input_scale")),
    "W8A8_SQ_PER_CHANNEL": Algorithm("I8", ("weight_scale", "input_scale"), "all"),
    "W8A16": Algorithm("I8", ("weight_scale",)),
    NVFP4_ALGO: Algorithm("U8", ("weight_scale", "weight_scale_2", "input_scale"), grouped=True),
}


@dataclass(frozen=True)
class ModeloptScheme:
    """How a whole model is quantized.

    Attributes:
        algorithm: One of `ALGORITHMS`.
        group_size: Inputs per scale of the 4-bit integer methods.
    """

    algorithm: str
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ConfigError(f"unknown quant_algo {self.algorithm!r}; allowed are {', '.join(ALGORITHMS)}")

    def tensors(self, name: str, shape: tuple[int, ...], dtype: str, folded: Collection[str]) -> list[Stored]:
        """The tensors that stand for the weight of one Linear.

        Args:
            name: Of the Linear.
            shape: Of its weight, (out, in).
            dtype: safetensors' name of the type of factors; scales are F32 or, NVFP4's, F8_E4M3.
            folded: Linears whose factors a norm has taken.
        """
        out, width = shape
        algorithm = ALGORITHMS[self.algorithm]
        rows, columns = out, width
        scale: tuple[str, tuple[int, ...]] = ("F32", (out,))
        if self.algorithm == NVFP4_ALGO:
            columns, scale = width // 2, ("F8_E4M3", (out, width // NVFP4_BLOCK))
        elif algorithm.weight == "U8":
            rows, scale = out // 2, ("F32", (out, width // self.group_size))
        elif self.algorithm == FP8_ALGO:
            scale = ("F32", ())
        stored: list[Stored] = [(f"{name}.weight", algorithm.weight, (rows, columns)), (f"{name}.weight_scale", *scale)]
        stored += [(f"{name}.{part}", "F32", ()) for part in algorithm.parts if part != "weight_scale"]
        if algorithm.smoothed == "all" or (algorithm.smoothed == "inner" and name not in folded):
            stored.append((f"{name}.pre_quant_scale", dtype, (width,)))
        return stored


def folded(names: Collection[str]) -> set[str]:
    """The Linears whose AWQ factors modelopt folds into the norm before them, from the names of a model's tensors.

    A Linear that alone reads a norm's output keeps its factors: Nemotron's MLP has no gate.
    """
    weights = set(names)
    found: set[str] = set()
    for name in weights:
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        layer = module.rpartition(".")[0]
        for group in TOGETHER:
            present = sum(f"{module}.{other}.weight" in weights for other in group)
            if leaf in group and present > 1 and f"{layer}.{FIRST_NORM}" in weights:
                found.add(f"{module}.{leaf}")
    return found
