"""Perplexity of a causal language model on a text, under one of two protocols.

`gptq_wikitext` is the protocol of the guides' evaluation script (AutoGPTQ's `Perplexity`, after llama.cpp):

* rows are joined without a separator, empty rows become a blank line, the text is tokenized once as the
  tokenizer does by default;
* windows of 512 tokens, not overlapping, the rest dropped; the first token of each window is replaced by BOS;
* the tokens at positions 257 to 511 are scored, i.e. the predictions at positions 256 to 510: 255 per window;
* after every window the perplexity so far is noted, and the *mean of these running values* is the headline.
  It weighs early windows more than late ones. The perplexity of all scored tokens is reported beside it.

`full_window` is ours: rows joined with a blank line, windows of W text tokens, BOS in front, every token scored.

Log-softmax is taken in float32 whatever the model's dtype, sums in float64.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from backend.errors import CheckpointError, ConfigError, DataError, ModelError
from backend.evaluate.metrics import Metric, versions
from backend.evaluate.stats import corpus_perplexity, corpus_stderr, mean_running_perplexity, running_stderr
from backend.event_stream import Progress

GPTQ_WINDOW = 512
GPTQ_FIRST = 256
LOGITS_BUDGET = 2**30
"""Upper bound in bytes of one batch's logits: a vocabulary of 128k makes 134 MB per window of 512."""


@dataclass(frozen=True)
class Windows:
    """Token sequences to score.

    Attributes:
        tokens: (windows, length): position j predicts the token at j + 1.
        first: First position whose prediction is scored.
        protocol: What was done to the text, for the record.
    """

    tokens: Tensor
    first: int
    protocol: dict[str, Any]

    @property
    def scored(self) -> int:
        """Scored tokens per window."""
        return self.tokens.shape[1] - 1 - self.first


def read_rows(path: Path) -> list[str]:
    """Read the texts of a JSONL file with rows `{"text": str}`.

    Raises:
        DataError: If the file is missing, a line is not such a row, or there is no row.
    """
    rows: list[str] = []
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                text = json.loads(line)["text"]
                if not isinstance(text, str):
                    raise TypeError(f"'text' is a {type(text).__name__}")
                rows.append(text)
    except OSError as error:
        raise DataError(f"The evaluation text {path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'Line {len(rows) + 1} of the evaluation text {path} is not a JSON object with a "text" string: {error}.'
        ) from error
    if not rows:
        raise DataError(f"The evaluation text {path} has no rows.")
    return rows


def text_digest(rows: Iterable[str]) -> str:
    """SHA-256 of a text, as protocols state it."""
    return hashlib.sha256("\0".join(rows).encode()).hexdigest()


def gptq_windows(tokenizer: PreTrainedTokenizerBase, rows: Iterable[str], max_windows: int | None = None) -> Windows:
    """Cut a text into the windows of `gptq_wikitext`.

    Raises:
        DataError: If the text has fewer than 512 tokens.
    """
    text = "".join(row if row else " \n" for row in rows)
    ids = _encode(tokenizer, text, add_special_tokens=True)
    tokens, dropped = _cut(ids, GPTQ_WINDOW, max_windows, "gptq_wikitext")
    bos = tokenizer.bos_token_id
    if bos is not None:
        tokens[:, 0] = bos
    return Windows(
        tokens,
        GPTQ_FIRST,
        {
            "name": "gptq_wikitext",
            "window": GPTQ_WINDOW,
            "scored": "tokens 257 to 511 of each window (0-based)",
            "join": "rows concatenated, empty rows as a blank line",
            "bos": f"first token of each window replaced by BOS ({bos})"
            if bos is not None
            else "tokenizer has no BOS: first token of each window kept",
            "dropped_tokens": dropped,
        },
    )


def full_windows(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[str], window: int, max_windows: int | None = None
) -> Windows:
    """Cut a text into the windows of `full_window`: BOS and `window` tokens, all of them scored.

    Without a BOS token the first token of each window has nothing to be predicted from and is not scored.

    Raises:
        DataError: If the text has fewer than `window` tokens.
    """
    ids = _encode(tokenizer, "\n\n".join(rows), add_special_tokens=False)
    tokens, dropped = _cut(ids, window, max_windows, "full_window")
    bos = tokenizer.bos_token_id
    if bos is not None:
        tokens = torch.cat([torch.full((len(tokens), 1), bos, dtype=tokens.dtype), tokens], dim=1)
    return Windows(
        tokens,
        0,
        {
            "name": "full_window",
            "window": window,
            "scored": "every token" if bos is not None else "every token but the first of each window",
            "join": "rows joined with a blank line",
            "bos": f"BOS ({bos}) put before each window" if bos is not None else "tokenizer has no BOS: none added",
            "dropped_tokens": dropped,
        },
    )


def logits_batch(model: PreTrainedModel, windows: Windows, batch_size: int) -> int:
    """Windows per forward pass: what was asked for, lowered where their logits would not fit `LOGITS_BUDGET`."""
    length = windows.tokens.shape[1]
    window_bytes = length * model.config.get_text_config().vocab_size * model.dtype.itemsize
    return max(1, min(batch_size, LOGITS_BUDGET // window_bytes))


@torch.inference_mode()
def scored_logits(model: PreTrainedModel, windows: Windows, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Run a model over the windows, a batch at a time, and yield the logits of the positions that are scored.

    Args:
        model: A causal language model in eval mode.
        windows: What to score.
        batch_size: Windows per forward pass.

    Yields:
        Tokens (batch, length) and logits (batch, scored, vocab), on the model's device, in its dtype.
    """
    # logits of positions that are not scored are not computed where the model can leave them out
    keep = {"logits_to_keep": windows.scored} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    for batch in windows.tokens.split(batch_size):
        batch = batch.to(model.device)
        output = model(input_ids=batch[:, :-1], use_cache=False, **keep)
        yield batch, output.logits[:, -windows.scored :]


@torch.inference_mode()
def window_nll(
    model: PreTrainedModel, windows: Windows, *, batch_size: int = 8, on_step: Callable[[int], None] | None = None
) -> list[float]:
    """Mean negative log-likelihood of every window's scored tokens, in nats per token.

    Args:
        model: A causal language model in eval mode.
        windows: What to score.
        batch_size: Windows per forward pass; lowered where the logits would not fit `LOGITS_BUDGET`.
        on_step: Called with the number of windows done.

    Raises:
        CheckpointError: If a window's likelihood is not finite: the weights are broken.
    """
    count = len(windows.tokens)
    nll: list[float] = []
    for batch, logits in scored_logits(model, windows, logits_batch(model, windows, batch_size)):
        for row, targets in zip(logits, batch[:, windows.first + 1 :], strict=True):
            chosen = row.float().log_softmax(-1).gather(-1, targets[:, None])  # (scored, 1)
            nll.append(-chosen.double().mean().item())
        if on_step:
            on_step(len(nll))
    broken = [i for i, value in enumerate(nll) if value != value or value == float("inf")]
    if broken:
        raise CheckpointError(
            f"{len(broken)} of {count} windows have no finite likelihood (first: window {broken[0]}). "
            "The model's outputs overflow or its weights are damaged; quantize it again or use dtype float32."
        )
    return nll


def measure_perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[str],
    *,
    text_name: str,
    protocols: Sequence[str] = ("gptq_wikitext", "full_window"),
    window: int = 512,
    max_windows: int | None = None,
    batch_size: int = 8,
    on_progress: Progress | None = None,
) -> list[Metric]:
    """Measure perplexity under the named protocols.

    Args:
        model: A causal language model in eval mode.
        tokenizer: Its tokenizer.
        rows: The rows of the text, in order.
        text_name: What the text is called in the protocol, e.g. `wikitext/wikitext-2-raw-v1:test`.
        protocols: Names among `gptq_wikitext` and `full_window`.
        window: Tokens per window of `full_window`.
        max_windows: Score only the first windows.
        batch_size: Windows per forward pass.
        on_progress: Called with (windows done, windows of all protocols, message).

    Returns:
        Two values for `gptq_wikitext` (mean of running values, corpus), one for `full_window`.

    Raises:
        ConfigError: If a protocol is unknown.
        DataError: If the text is shorter than one window.
        ModelError: If the model's context is shorter than a window.
        CheckpointError: If the model's outputs are not finite.
    """
    plans: list[Windows] = []
    for name in protocols:
        if name == "gptq_wikitext":
            plans.append(gptq_windows(tokenizer, rows, max_windows))
        elif name == "full_window":
            plans.append(full_windows(tokenizer, rows, window, max_windows))
        else:
            raise ConfigError(
                f"{name!r} is no perplexity protocol; choose gptq_wikitext or full_window.",
                key="EVALUATION.PROTOCOLS",
                value=name,
            )
    for plan in plans:
        check_context(model, plan)
    total = sum(len(plan.tokens) for plan in plans)
    digest = text_digest(rows)
    metrics: list[Metric] = []
    done = 0
    for plan in plans:

        def step(windows_done: int, base: int = done, name: str = plan.protocol["name"]) -> None:
            if on_progress:
                on_progress(base + windows_done, total, f"perplexity {name}")

        nll = window_nll(model, plan, batch_size=batch_size, on_step=step)
        done += len(nll)
        stated = plan.protocol | {
            "text": text_name,
            "text_sha256": digest,
            "windows": len(nll),
            "tokens": len(nll) * plan.scored,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": model.device.type,
            "versions": versions("torch", "transformers", "tokenizers"),
        }
        metrics += _metrics(stated, nll)
    return metrics


def _metrics(protocol: dict[str, Any], nll: list[float]) -> list[Metric]:
    """The values that a protocol reports, headline first."""
    corpus = corpus_perplexity(nll), corpus_stderr(nll)
    if protocol["name"] == "gptq_wikitext":
        headline = mean_running_perplexity(nll), running_stderr(nll)
        named = [("gptq", "mean of running perplexities", headline), ("gptq, corpus", "corpus", corpus)]
    else:
        named = [(f"{protocol['window']}-token windows", "corpus", corpus)]
    metrics: list[Metric] = []
    for label, statistic, (value, stderr) in named:
        summary = (
            f"{protocol['name']}, {statistic}; {protocol['text']}; {protocol['windows']} windows of "
            f"{protocol['window']}, {protocol['tokens']} tokens; {protocol['dtype']}, {protocol['device']}"
        )
        metrics.append(
            Metric(
                metric="perplexity",
                name=f"Perplexity ({protocol['text']}, {label})",
                value=value,
                stderr=stderr,
                unit="",
                higher_is_better=False,
                protocol=protocol | {"statistic": statistic, "summary": summary},
                samples=nll,
            )
        )
    return metrics


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool) -> list[int]:
    # verbose=False: the text is longer than the model's context on purpose
    return list(tokenizer(text, add_special_tokens=add_special_tokens, truncation=False, verbose=False)["input_ids"])


def _cut(ids: list[int], window: int, max_windows: int | None, protocol: str) -> tuple[Tensor, int]:
    """Cut token ids into whole windows; returns (windows, window) and the number of tokens left over."""
    count = len(ids) // window
    if count == 0:
        raise DataError(
            f"The evaluation text has {len(ids)} tokens; {protocol} needs at least one window of {window}. "
            "Use a longer text or a smaller window."
        )
    count = min(count, max_windows) if max_windows else count
    return torch.tensor(ids[: count * window]).view(count, window), len(ids) - count * window


def check_context(model: PreTrainedModel, plan: Windows) -> None:
    """Refuse windows that are longer than the model's context.

    Raises:
        ModelError: With both lengths.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = plan.tokens.shape[1] - 1
    if context is not None and needed > context:
        raise ModelError(
            f"{plan.protocol['name']} feeds {needed} tokens at once, but the model's max_position_embeddings is "
            f"{context}. Choose a protocol with a smaller window."
        )
