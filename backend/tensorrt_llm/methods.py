"""The quantization methods of `TensorRTLLM`, and what each asks of the program that runs it.

Two programs run the results. The PyTorch backend reads Hugging Face folders that nvidia-modelopt writes; it is the only
one that is still developed. The TensorRT engines of TensorRT-LLM 1.2.1 and before are built from TensorRT-LLM's own
checkpoints; SmoothQuant and 8-bit weights run nowhere else.

Sources: TensorRT-LLM 1.2.1, documentation of quantization (hardware, recipes); nvidia-modelopt 0.47 (configurations).
"""

from __future__ import annotations

from dataclasses import dataclass

PYTORCH, ENGINE = MODES = ("pytorch", "tensorrt")
"""Names of the two ways to run, as `trtllm-bench --backend` has them."""
LEGACY_VERSION = "1.2.1"
"""The last release that builds engines, and the one whose image and command lines are pinned here."""
IMAGE = f"nvcr.io/nvidia/tensorrt-llm/release:{LEGACY_VERSION}"


@dataclass(frozen=True)
class Method:
    """One `quant_method`.

    Attributes:
        name: In the job file.
        label: For people.
        modelopt: Name of its configuration in `modelopt.torch.quantization`.
        quant_algo: What checkpoints call it.
        modes: The backends that run it, the preferred one first.
        capability: The lowest compute capability of a GPU that runs it.
        gpus: The same in words.
        grouped: Whether weights share scales in blocks along the inputs.
        needs_text: Whether calibration text changes the result.
        needs_cuda: Whether quantizing needs a GPU too.
    """

    name: str
    label: str
    modelopt: str
    quant_algo: str
    modes: tuple[str, ...]
    capability: tuple[int, int]
    gpus: str
    grouped: bool = False
    needs_text: bool = True
    needs_cuda: bool = False


AMPERE, ADA, BLACKWELL = (8, 0), (8, 9), (10, 0)

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            "int4_awq", "AWQ, 4-bit weights", "INT4_AWQ_CFG", "W4A16_AWQ", MODES, AMPERE,
            "Ampere, Ada or Hopper", grouped=True,
        ),
        Method("fp8", "FP8 weights and activations", "FP8_DEFAULT_CFG", "FP8", MODES, ADA, "Ada, Hopper or Blackwell"),
        Method(
            "smoothquant", "SmoothQuant, 8-bit weights and activations", "INT8_SMOOTHQUANT_CFG", "W8A8_SQ_PER_CHANNEL",
            (ENGINE,), AMPERE, "Ampere, Ada or Hopper",
        ),
        Method(
            "int8", "8-bit weights", "INT8_WEIGHT_ONLY_CFG", "W8A16", (ENGINE,), AMPERE, "Ampere, Ada or Hopper",
            needs_text=False,
        ),
        Method(
            "w4a8_awq", "AWQ, 4-bit weights and FP8 activations", "W4A8_AWQ_BETA_CFG", "W4A8_AWQ", MODES, ADA,
            "Ada or Hopper", grouped=True,
        ),
        Method(
            "nvfp4", "NVFP4 weights and activations", "NVFP4_DEFAULT_CFG", "NVFP4", (PYTORCH,), BLACKWELL, "Blackwell",
            needs_cuda=True,
        ),
    )
}  # fmt: skip
