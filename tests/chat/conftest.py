from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.chat.client import ModelProcess
from tests.evaluate.tiny import make_model, make_tokenizer, save_folder


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template and a context of 256 tokens."""
    return save_folder(tmp_path_factory.mktemp("chat") / "model", make_model(context=256), make_tokenizer())


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model, without a chat template and without BOS."""
    tokenizer = make_tokenizer(bos=False, template=None)
    return save_folder(tmp_path_factory.mktemp("chat") / "plain", make_model(seed=3, context=256), tokenizer)


@pytest.fixture(scope="session")
def shared(chat_folder: Path) -> Iterator[ModelProcess]:
    """One running model for the tests that leave it running; the thread that started it is over, as on a server."""
    model = ModelProcess(chat_folder, threads=1)
    thread = threading.Thread(target=model.start)
    thread.start()
    thread.join()
    yield model
    model.close()


@pytest.fixture(scope="session")
def shared_plain(plain_folder: Path) -> Iterator[ModelProcess]:
    with ModelProcess(plain_folder, threads=1) as model:
        yield model
