"""Train the demo model from nothing: ``python -m backend.demo.train``.

A Llama of 6.3 million parameters reads 5.7 million tokens of `corpus.documents("train")`, once, in bfloat16 autocast:
under an hour on two CPU cores. The same seed gives the same text, tokenizer and order of batches; the
weights are the same up to floating-point summation order.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from backend.demo import MODEL_DIR, TEXT_FILES, corpus, questions
from backend.demo.measure import accuracy_by_kind, perplexity
from backend.demo.tokenizer import CONTEXT, VOCAB_SIZE, train_tokenizer

TOKENIZER_CHARACTERS = 4_000_000
WARMUP_STEPS = 60


@dataclass(frozen=True)
class Phase:
    """A stretch of the training.

    Attributes:
        mixture: Key of `corpus.MIXTURES`.
        steps: Number of batches.
        lengths: Lengths of sequences in tokens, taken in turns; short ones are cheaper.
    """

    mixture: str
    steps: int
    lengths: tuple[int, ...]


PHASES = (
    Phase("broad", 600, (256,)),
    Phase("drill", 50, (256,)),
    Phase("drill", 150, (512, 512, 512, 1024)),
    Phase("echo", 150, (256,)),
    Phase("recall", 150, (256, 256, 256, 512)),
    Phase("even", 300, (256, 512)),
)
STEPS = sum(phase.steps for phase in PHASES)
RATE_KNOTS = ((0, 1.0), (520, 1.0), (800, 0.64), (801, 0.85), (1100, 0.85), (STEPS, 0.0))
"""(step, factor of the peak learning rate); linear between the knots."""


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model in float32: few, wide layers, every width a multiple of 128."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str], rng: random.Random) -> Iterator[list[int]]:
    """Documents as tokens, parted by end and begin tokens or by a blank line (as evaluation texts are)."""
    hard = [tokenizer.eos_token_id, tokenizer.bos_token_id]
    soft = tokenizer.encode("\n\n", add_special_tokens=False)
    while True:
        chunk = [next(texts) for _ in range(500)]
        for ids in tokenizer(chunk, add_special_tokens=False).input_ids:
            yield ids
            ends = ids[-1] == tokenizer.eos_token_id
            yield (hard[1:] if ends else hard) if rng.random() < 0.5 else soft


def batches(tokenizer: PreTrainedTokenizerFast, tokens_per_step: int, seed: int) -> Iterator[torch.Tensor]:
    """All batches of the training, each (sequences, length + 1), phase by phase."""
    streams: dict[str, Iterator[int]] = {}
    first = 0
    for phase in PHASES:
        if phase.mixture not in streams:
            texts = corpus.documents("train", seed + first, phase.mixture)
            pieces = token_stream(tokenizer, texts, random.Random(seed + first))
            streams[phase.mixture] = itertools.chain.from_iterable(pieces)
        for step in range(phase.steps):
            length = phase.lengths[step % len(phase.lengths)]
            count = tokens_per_step // length
            tokens = list(itertools.islice(streams[phase.mixture], count * (length + 1)))
            batch = torch.tensor(tokens).view(count, length + 1)
            batch[: count // 2, 0] = tokenizer.bos_token_id  # half of the windows begin as `tokenizer(text)` does
            yield batch
        first += phase.steps


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the decoder layers, AdamW for embeddings, output head and norms."""
    inner = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    outer = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(inner, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate(step: int, first: int) -> float:
    """Factor of the peak rate at `step` of a run that began, with fresh optimizers, at step `first`."""
    for (left, high), (right, low) in itertools.pairwise(RATE_KNOTS):
        if left <= step < right:
            factor = high + (low - high) * (step - left) / (right - left)
            warmup = WARMUP_STEPS // 3 if first else WARMUP_STEPS
            return factor * min(1.0, (step - first + 1) / warmup)
    raise ValueError(f"step {step}: the training has {STEPS} steps")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bfloat16 with its tokenizer and generation settings."""
    half = copy.deepcopy(model).bfloat16()
    half.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings.pop("backend", None)
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the one name that transformers 4 and 5 both know
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, every: int) -> str:
    """Validation perplexity and accuracy on every n-th test question, as one line."""
    texts = [json.loads(line)["text"] for line in TEXT_FILES["validation"].read_text(encoding="utf-8").splitlines()]
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        value = perplexity(model, tokenizer, texts, limit=40)
        accuracy = accuracy_by_kind(model, tokenizer, questions.rows()[::every])
    model.train()
    return f"validation perplexity {value:.3f}, accuracy " + ", ".join(f"{k} {v:.3f}" for k, v in accuracy.items())


def train(arguments: argparse.Namespace) -> None:
    """Run the training and leave the model in `arguments.output`, also after every `save_every` steps."""
    torch.manual_seed(arguments.seed)
    first = arguments.first
    if first:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.output, local_files_only=True)
        model = LlamaForCausalLM.from_pretrained(arguments.output, dtype=torch.float32, local_files_only=True)
    else:
        tokenizer = train_tokenizer(corpus.take(corpus.documents("train", mixture="broad"), TOKENIZER_CHARACTERS))
        model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters())} parameters", flush=True)
    forward = torch.compile(model, dynamic=True) if arguments.compile else model
    chain = optimizers(model)
    source = itertools.islice(batches(tokenizer, arguments.tokens_per_step, arguments.seed), first, None)
    seen, running, started = 0, 0.0, time.perf_counter()
    for step, batch in enumerate(source, first):
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(input_ids=batch[:, :-1], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chain:
            for group in optimizer.param_groups:
                group["lr"] = arguments.learning_rate * learning_rate(step, first)
            optimizer.step()
            optimizer.zero_grad()
        seen += batch[:, 1:].numel()
        running += (loss.item() - running) / min(step - first + 1, 20)
        if step % 10 == 9:
            pace = seen / (time.perf_counter() - started)
            print(f"step {step + 1}/{STEPS}: loss {running:.4f}, {seen} tokens, {pace:.0f} tokens/s", flush=True)
        last = step == STEPS - 1
        if last or step % arguments.save_every == arguments.save_every - 1:
            save(model, tokenizer, arguments.output)
            print(evaluate(model, tokenizer, 1 if last else 4), flush=True)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description="Train the demo model from nothing.")
    parser.add_argument(
        "--first", type=int, default=0, help="continue from the model in --output at this step, with fresh optimizers"
    )
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="peak, for both optimizers")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="about a quarter faster; needs a C++ compiler")
    parser.add_argument("--save-every", type=int, default=100, help="steps between saves")
    parser.add_argument("--output", type=Path, default=MODEL_DIR, help="folder to write the model to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    train(arguments)


if __name__ == "__main__":
    main()
