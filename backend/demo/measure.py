"""Quick measures of the demo model for its trainer and its tests: perplexity and multiple-choice accuracy.

``python -m backend.demo.measure`` prints them for the model as it is and after rounding its decoder to 4, 3 and 2
bits. The product's own evaluation (`backend.evaluate`) is separate and stricter; this needs nothing but torch.
"""

from __future__ import annotations

import copy
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from backend.demo import MODEL_DIR, TASK_DIR, TEXT_FILES

Row = Mapping[str, Any]


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, window: int = 512, limit: int
) -> float:
    """Exponential of the mean loss per token over the first `limit` windows of the texts joined by blank lines."""
    tokens = tokenizer("\n\n".join(texts), return_tensors="pt", add_special_tokens=False).input_ids[0]
    windows = tokens[: len(tokens) // window * window].view(-1, window)[:limit]  # (windows, window)
    losses = []
    for chunk in windows.split(8):
        logits = model(input_ids=chunk).logits[:, :-1].float()  # (8, window - 1, vocabulary)
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="none"))
    return math.exp(torch.cat(losses).mean().item())


def accuracy_by_kind(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Row]
) -> dict[str, float]:
    """Share of right answers per question kind and for ``"all"``: the choice with the highest total likelihood."""
    outcomes: dict[str, list[bool]] = defaultdict(list)
    rows = list(rows)
    for chunk in (rows[i : i + 8] for i in range(0, len(rows), 8)):
        for row, right in zip(chunk, _right(model, tokenizer, chunk), strict=True):
            outcomes[str(row["kind"])].append(right)
            outcomes["all"].append(right)
    return {kind: sum(rights) / len(rights) for kind, rights in sorted(outcomes.items())}


@torch.inference_mode()
def _right(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[bool]:
    prompts = [str(row["question"]) for row in rows]
    texts = [f"{prompt} {choice}" for prompt, row in zip(prompts, rows, strict=True) for choice in row["choices"]]
    batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    ids, mask = batch.input_ids, batch.attention_mask  # (4 * rows, longest)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    scores = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)  # (4 * rows, longest - 1)
    starts = torch.tensor([len(tokenizer(prompt).input_ids) - 1 for prompt in prompts for _ in range(4)])
    counted = mask[:, 1:].bool() & (torch.arange(scores.shape[1]) >= starts[:, None])
    totals = (scores * counted).sum(-1).view(-1, 4)
    return [int(total.argmax()) == row["answer"] for total, row in zip(totals, rows, strict=True)]


def rounded(model: PreTrainedModel, bits: int, group_size: int = 128) -> PreTrainedModel:
    """A copy whose decoder Linears are rounded to the nearest of 2^bits levels per group of inputs."""
    copied = copy.deepcopy(model)
    for layer in copied.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                weight = module.weight.data
                groups = weight.float().view(weight.shape[0], -1, group_size)  # (out, in/group, group)
                low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
                scale = (high - low) / (2**bits - 1)
                module.weight.data = (((groups - low) / scale).round() * scale + low).view_as(weight).to(weight.dtype)
    return copied


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Print perplexity of the test text and accuracy on all questions, at 16, 4, 3 and 2 bits."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True, dtype=torch.bfloat16).eval()
    texts = [row["text"] for row in read_rows(TEXT_FILES["test"])]
    questions = read_rows(TASK_DIR / "questions.jsonl")
    for bits in (16, 4, 3, 2):
        measured = model if bits == 16 else rounded(model, bits)
        value = perplexity(measured, tokenizer, texts, limit=200)
        accuracy = accuracy_by_kind(measured, tokenizer, questions)
        print(f"{bits} bits: perplexity {value:.3f}, " + ", ".join(f"{k} {v:.3f}" for k, v in accuracy.items()))


if __name__ == "__main__":
    main()
