"""A lean generation loop: prefill once, then one forward pass per token with a key/value cache.

Chat and the benchmark use this same loop for both models. It does what `generate` does for one sequence
without its per-token bookkeeping, which for small models costs more than the model itself.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel


class Sampler:
    """Picks the next token: greedy at temperature 0, else nucleus sampling (Holtzman et al. 2020).

    The token is found by inverting the cumulative distribution, sorted by probability, at one random number per
    step. Two models with the same seed thus draw the same numbers: they part where their distributions do.

    Args:
        temperature: 0 for the most likely token; higher is more random.
        top_p: Sample from the smallest set of tokens with at least this probability, in (0, 1].
        seed: Fixes the random numbers.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> None:
        self.temperature = temperature
        self.top_p = top_p
        self._random = torch.Generator().manual_seed(seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """Pick a token id from the logits (vocab,) of one position."""
        if self.temperature <= 0:
            return int(logits.argmax())
        probabilities, order = (logits.float().cpu() / self.temperature).softmax(-1).sort(descending=True)
        cumulative = probabilities.double().cumsum(-1)  # (vocab,)
        last = min(int(torch.searchsorted(cumulative, self.top_p)), len(cumulative) - 1)
        drawn = torch.rand((), generator=self._random, dtype=torch.float64) * cumulative[last]
        return int(order[min(int(torch.searchsorted(cumulative, drawn, right=True)), last)])


class Decoder:
    """One sequence of one model: the prompt, then token after token.

    Args:
        model: A causal language model in eval mode.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._cache = DynamicCache(config=model.config)
        # the logits of the whole prompt are not needed: at a vocabulary of 128k they cost more than a layer
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._arguments = {"logits_to_keep": 1} if last_only else {}

    @torch.inference_mode()
    def feed(self, ids: Sequence[int]) -> torch.Tensor:
        """Append tokens; returns the logits (vocab,) of the next one."""
        batch = torch.tensor([ids], device=self._model.device)  # (1, tokens)
        output = self._model(input_ids=batch, past_key_values=self._cache, use_cache=True, **self._arguments)
        return output.logits[0, -1]


def stop_token_ids(model: PreTrainedModel, tokenizer_eos: int | None) -> frozenset[int]:
    """Ids that end an answer: the generation config's (one or several) and the tokenizer's."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, tokenizer_eos] if i is not None)


def generate(
    model: PreTrainedModel,
    prompt: Sequence[int],
    sampler: Sampler,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[int]:
    """Yield token ids until a stop token (not yielded), the limit, or cancellation."""
    decoder = Decoder(model)
    logits = decoder.feed(prompt)
    for count in range(1, max_new_tokens + 1):
        token = sampler(logits)
        if token in stop_ids or cancelled():
            return
        yield token
        if count < max_new_tokens:
            logits = decoder.feed([token])


@dataclass(frozen=True)
class Timing:
    """Wall seconds of one repetition.

    Attributes:
        prefill_s: From the prompt's ids to its next token's logits.
        decode_s: For all new tokens, one forward pass each.
    """

    prefill_s: float
    decode_s: float


def time_generation(model: PreTrainedModel, *, prompt_tokens: int, new_tokens: int, seed: int) -> Timing:
    """Prefill random tokens, then decode greedily; end-of-text is ignored so that every run has equal work."""
    vocabulary = model.config.get_text_config().vocab_size
    random = torch.Generator().manual_seed(seed)
    prompt = torch.randint(vocabulary, (prompt_tokens,), generator=random).tolist()
    decoder = Decoder(model)
    start = time.perf_counter()
    token = int(decoder.feed(prompt).argmax())  # int() waits for the GPU
    prefilled = time.perf_counter()
    for _ in range(new_tokens):
        token = int(decoder.feed([token]).argmax())
    return Timing(prefilled - start, time.perf_counter() - prefilled)
