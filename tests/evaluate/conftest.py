from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tests.evaluate.tiny import make_model, make_text, make_tokenizer, save_folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def tokenizer_without_bos() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos=False)


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture(scope="session")
def rows() -> list[str]:
    return make_text(260)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two model folders that differ a little: stand-ins for baseline and quantized."""
    root = tmp_path_factory.mktemp("models")
    return (
        save_folder(root / "baseline", make_model(), make_tokenizer()),
        save_folder(root / "quantized", make_model(noise=0.05), make_tokenizer()),
    )
