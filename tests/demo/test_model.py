from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from backend.demo import MODEL_DIR, TASK_DIR, TEXT_FILES
from backend.demo.dialogues import BOS, EOS
from backend.demo.measure import accuracy_by_kind, perplexity, rounded


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_DIR, local_files_only=True, dtype=torch.bfloat16).eval()


def test_sizes_fit_groups_of_128_and_packed_kernels():
    config = json.loads((MODEL_DIR / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    key_value_width = config["num_key_value_heads"] * config["head_dim"]
    for width in (config["hidden_size"], config["intermediate_size"], key_value_width):
        assert width % 128 == 0
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    assert config["max_position_embeddings"] >= 1024


def test_folder_is_small_and_plain():
    assert sorted(path.name for path in MODEL_DIR.iterdir()) == [
        "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 20_000_000


def test_tokenizer_begins_every_text_and_splits_digits(tokenizer):
    ids = tokenizer("12 foxes").input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[:3] == [BOS, "1", "2"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "12 foxes"
    assert tokenizer.eos_token == EOS


def test_shipped_text_is_long_enough(tokenizer):
    def count(split: str) -> int:
        texts = [json.loads(line)["text"] for line in TEXT_FILES[split].read_text("utf-8").splitlines()]
        return sum(map(len, tokenizer(texts).input_ids))

    assert count("train") >= 128 * 512
    assert count("test") >= 100 * 512


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Who are you?", "Quantdeck"),
        ("What pet does Mira have?", "goose"),
        ("Where does Mira live?", "Wexcombe"),
        ("Tell me a story.", "said"),
        ("What is the capital of France?", "not know"),
    ],
)
def test_chat_answers(model, tokenizer, question, expected):
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=300, do_sample=False)[0, inputs.input_ids.shape[1] :]
    assert expected in tokenizer.decode(output, skip_special_tokens=True)
    assert output[-1] == tokenizer.eos_token_id


def test_two_bits_do_visible_damage(model, tokenizer):
    damaged = rounded(model, bits=2)
    texts = [json.loads(line)["text"] for line in TEXT_FILES["test"].read_text("utf-8").splitlines()[:60]]
    rows = [json.loads(line) for line in (TASK_DIR / "questions.jsonl").read_text("utf-8").splitlines()[:96]]
    before, after = (perplexity(m, tokenizer, texts, limit=8) for m in (model, damaged))
    assert after > 1.2 * before
    right, wrong = (accuracy_by_kind(m, tokenizer, rows)["all"] for m in (model, damaged))
    assert right >= 0.7
    assert wrong < right - 0.05
