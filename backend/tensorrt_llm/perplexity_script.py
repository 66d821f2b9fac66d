"""Perplexity of a model inside TensorRT-LLM: the summed loss of windows of token ids, from the prompts' logits.

A program of its own, copied to where TensorRT-LLM is and run by the Python there; it imports nothing of Quantdeck. It
was tested against a stand-in of TensorRT-LLM's API, and has not run on a GPU. Reuse of the KV cache is off: with it,
TensorRT-LLM returns logits only for the tokens that it really computes, fewer than the prompt has.

    python3 perplexity.py WINDOWS.json RESULT.json --model FOLDER --backend pytorch|tensorrt [--tp N]

WINDOWS.json: `{"windows": [{"tokens": [ids], "counted": [positions]}]}`; the loss at position i is that of token i
after those before it.
RESULT.json: `{"windows": [{"nll": sum in nats, "count": positions}], "version": TensorRT-LLM's}`.

API: TensorRT-LLM 1.2, `LLM`, `SamplingParams(return_context_logits)`, `KvCacheConfig(enable_block_reuse)`.
"""

import argparse
import json
import math
import os
import sys

ROWS = 128  # positions whose logits are in float64 at a time
LEAST_STEP_TOKENS = 8192  # of TensorRT-LLM itself; a window must fit in one step


def main():
    """Read the windows, measure them one by one, write the result whole or not at all."""
    options = _options()
    with open(options.windows, encoding="utf-8") as file:
        windows = json.load(file)["windows"]
    import tensorrt_llm

    vocabulary = vocabulary_size(options.model)
    llm, sampling = load(options, max(len(window["tokens"]) for window in windows))
    measured = []
    for number, window in enumerate(windows):
        measured.append(measure(llm, sampling, window, vocabulary))
        print(f"window {number + 1} of {len(windows)}", file=sys.stderr, flush=True)
    llm.shutdown()
    temporary = options.result + ".tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump({"windows": measured, "version": str(tensorrt_llm.__version__)}, file, allow_nan=False)
    os.replace(temporary, options.result)


def _options():
    parser = argparse.ArgumentParser(description="Perplexity of a model inside TensorRT-LLM.")
    parser.add_argument("windows")
    parser.add_argument("result")
    parser.add_argument("--model", required=True)
    parser.add_argument("--backend", choices=("pytorch", "tensorrt"), required=True)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--kv-cache-fraction", type=float, default=0.2)
    return parser.parse_args()


def load(options, longest):
    """The model, and the parameters that make it return its logits for a prompt."""
    from tensorrt_llm import SamplingParams
    from tensorrt_llm.llmapi import KvCacheConfig

    cache = KvCacheConfig(enable_block_reuse=False, free_gpu_memory_fraction=options.kv_cache_fraction)
    common = {"model": options.model, "skip_tokenizer_init": True, "kv_cache_config": cache}
    if options.backend == "tensorrt":
        from tensorrt_llm._tensorrt_engine import LLM

        llm = LLM(**common)
    else:
        from tensorrt_llm import LLM

        llm = LLM(
            **common,
            tensor_parallel_size=options.tp,
            max_batch_size=1,
            max_seq_len=longest + 1,
            max_num_tokens=max(LEAST_STEP_TOKENS, longest),
        )
    return llm, SamplingParams(max_tokens=1, end_id=-1, pad_id=-1, return_context_logits=True)


def vocabulary_size(model):
    """Tokens of the vocabulary, from config.json: rows of logits may be padded beyond it."""
    with open(os.path.join(model, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    for section in (config.get("pretrained_config"), config, config.get("text_config")):
        if isinstance(section, dict) and isinstance(section.get("vocab_size"), int):
            return section["vocab_size"]
    sys.exit("config.json of the model has no vocab_size")


def measure(llm, sampling, window, vocabulary):
    """Summed loss of a window, nats, in float64.

    Exits if the logits are not those of the whole prompt, or the loss is not finite.
    """
    import torch

    tokens, counted = window["tokens"], window["counted"]
    logits = llm.generate([{"prompt_token_ids": tokens}], sampling)[0].context_logits
    if logits is None or logits.ndim != 2 or logits.shape[0] != len(tokens) or logits.shape[1] < vocabulary:
        shape = None if logits is None else tuple(logits.shape)
        sys.exit(f"found logits of shape {shape}; ({len(tokens)}, at least {vocabulary}) is needed")
    total = 0.0
    for start in range(0, len(counted), ROWS):
        positions = torch.tensor(counted[start : start + ROWS], device=logits.device)
        rows = logits[positions - 1, :vocabulary].double()
        targets = torch.tensor(tokens, device=logits.device)[positions]
        total -= torch.log_softmax(rows, -1).gather(1, targets[:, None]).sum().item()
    if not math.isfinite(total):
        sys.exit(f"found a loss of {total}; the model's logits are not finite")
    return {"nll": total, "count": len(counted)}


if __name__ == "__main__":
    main()
