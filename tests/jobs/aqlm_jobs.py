"""Small AQLM jobs: a model of random weights that speaks the demo model's tokens, and job files that are quick."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from backend.demo import MODEL_DIR
from backend.schema import parse_yaml
from tests.conftest import demo_text

SECTION: dict[str, Any] = {
    "EFFORT": "fast",
    "save_intermediate_results": True,
    "calibration_config": {
        "num_codebooks": 1, "nbits_per_codebook": 9, "nsamples": 12, "model_seqlen": 32, "val_size": 4,
        "finetune_max_epochs": 2, "finetune_batch_size": 4, "finetune_lr": 0.001,
    },
    "finetune_config": {
        "max_epochs": 6, "batch_size": 4, "microbatch_size": 2, "model_seqlen": 32, "lr": 0.001, "code_lr": 0.01,
        "eval_every_steps": 2, "save_every_steps": 1, "gradient_checkpointing": False,
    },
}  # fmt: skip
UNMEASURED = {"EVALUATION": {"ENABLED": False}, "BENCHMARK": {"ENABLED": False}}


def aqlm_text(job_id: str, model: Path | str = "quantdeck/demo", **changes: Any) -> str:
    """A job file; keys of AQLM's sections go by `calibration_config`, `finetune_config`, `FINETUNE_DATA`."""
    section = dict(SECTION)
    for key in ("calibration_config", "finetune_config"):
        section[key] = {**SECTION[key], **changes.pop(key, {})}
    section |= {key: changes.pop(key) for key in ("EFFORT", "FINETUNE_DATA") if key in changes}
    calibration = changes.pop("CALIBRATION", {})
    text: dict[str, Any] = {"ALGORITHM": "AQLM", "MODEL": str(model), "CALIBRATION": None, **changes}
    document = parse_yaml(demo_text(job_id, llm={"AutoAWQ": None, "AQLM": section}, **text))
    for key, value in calibration.items():
        document.set(("CALIBRATION", key), value)
    return document.dump()


def tiny_model(folder: Path) -> Path:
    """A Llama of three narrow layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=2048, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(MODEL_DIR / name, folder)
    return folder
