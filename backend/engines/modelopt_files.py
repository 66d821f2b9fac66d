"""From what nvidia-modelopt writes to the folder that is published: types, configuration, files that travel along."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from backend.errors import CheckpointError
from backend.files import give_usual_rights, sync_path
from backend.formats.headers import INDEX_FILE
from backend.formats.side_files import copy_side_files, model_config, write_json
from backend.formats.spool import writing
from backend.formats.trtllm_checkpoint import complete_config, complete_hf_config

HF_QUANT_CONFIG = "hf_quant_config.json"
WIDE = ("weight_scale", "weight_scale_2", "input_scale")
"""Parts of a quantized Linear that stay in float32, as TensorRT-LLM's kernels read them."""


def rewrite(exported: Path, out: Path, dtype: str) -> None:
    """Copy the weight files, with everything that is not quantized in the 16-bit type.

    modelopt exports it in the type that the model was calibrated in, float32 on a CPU.

    Args:
        exported: The Hugging Face folder that modelopt wrote.
        out: Where the files go.
        dtype: `float16` or `bfloat16`.

    Raises:
        CheckpointError: If a value does not fit into that type, or the disk is full.
    """
    import torch
    from safetensors.torch import load_file, save_file

    target = getattr(torch, dtype)
    for path in sorted(exported.glob("*.safetensors")):
        tensors = load_file(str(path))
        for name, tensor in tensors.items():
            part = name.rpartition(".")[2]
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16) or part in WIDE:
                continue
            cast = tensor.to(target)
            if not cast.isfinite().all():
                what = "holds NaN or infinity" if not tensor.isfinite().all() else f"is too large for {dtype}"
                raise CheckpointError(f"{name} {what}; set dtype to bfloat16, or check the model's own weights")
            tensors[name] = cast
        with writing(out / path.name):
            save_file(tensors, out / path.name, metadata={"format": "pt"})
        give_usual_rights(out / path.name)
        sync_path(out / path.name)
    if (exported / INDEX_FILE).is_file():
        index = json.loads((exported / INDEX_FILE).read_text(encoding="utf-8"))
        write_json(out / INDEX_FILE, {"metadata": {}, "weight_map": index["weight_map"]})


def write_configs(source: Path, scratch: Path, out: Path, dtype: str, engine_checkpoint: str) -> None:
    """Write what stands beside the weights.

    config.json is the source's own, as programs of any age read it, with modelopt's `quantization_config`.

    Args:
        source: The 16-bit model.
        scratch: modelopt's exports: `hf`, and maybe TensorRT-LLM's checkpoint.
        out: The folder to publish.
        dtype: Type of what is not quantized.
        engine_checkpoint: Name of the checkpoint's folder in `scratch` and `out`.
    """
    exported = json.loads((scratch / "hf" / "config.json").read_text(encoding="utf-8"))
    config = complete_hf_config(model_config(source, dtype, exported.get("quantization_config")))
    copy_side_files(source, out)
    write_json(out / "config.json", config)
    if (scratch / "hf" / HF_QUANT_CONFIG).is_file():
        shutil.copyfile(scratch / "hf" / HF_QUANT_CONFIG, out / HF_QUANT_CONFIG)
    checkpoint = scratch / engine_checkpoint
    if checkpoint.is_dir():
        written = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
        write_json(checkpoint / "config.json", complete_config(written, config))
        for path in checkpoint.iterdir():
            give_usual_rights(path)
        shutil.move(checkpoint, out / engine_checkpoint)
