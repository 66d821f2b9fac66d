"""AutoRound with its defaults but for the number of steps."""

from __future__ import annotations

from pathlib import Path

from auto_round import AutoRound
from peer import Task, run
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(task: Task) -> None:
    """Quantize and save in the GPTQ layout."""
    model = AutoModelForCausalLM.from_pretrained(task.model_dir, dtype="auto")
    rounder = AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(task.model_dir),
        bits=task.bits,
        group_size=task.group_size,
        sym=task.symmetric,
        iters=task.iterations,
        dataset=list(task.tokens.split(1)),
        nsamples=len(task.tokens),
        seqlen=task.tokens.shape[1],
        device_map="cpu",
    )
    rounder.quantize_and_save(task.out_dir, format="auto_round:auto_gptq")
    for folder in Path(task.out_dir).glob("*/"):  # it writes to a folder of its own inside
        for file in folder.iterdir():
            file.rename(Path(task.out_dir) / file.name)


run(quantize, "auto-round", "torch", "transformers")
