"""Conversations as calibration text: the model's template, no special token twice, and clear refusals."""

import json

import pytest
from transformers import AutoTokenizer

from backend.demo import MODEL_DIR
from backend.errors import DataError
from backend.sources.messages import has_chat_template, is_messages, row_encoder
from backend.sources.texts import TextSource, read_calibration_rows, read_rows
from tests.conftest import write_jsonl

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def source(path, column="messages"):
    return TextSource(None, None, "train", (column,), None, path)


def test_a_conversation_is_written_by_the_template_with_its_special_tokens_once(tokenizer):
    (ids,) = row_encoder(tokenizer, "auto")([CHAT])
    assert ids == tokenizer.apply_chat_template(CHAT, tokenize=True)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_plain_text_keeps_the_tokenizers_own_special_tokens(tokenizer):
    assert row_encoder(tokenizer, "auto")(["Hi there"]) == tokenizer(["Hi there"])["input_ids"]


def test_mixed_rows_keep_their_order(tokenizer):
    encode = row_encoder(tokenizer, "auto")
    assert encode(["one", CHAT, "two"]) == [*encode(["one"]), *encode([CHAT]), *encode(["two"])]


def test_on_makes_text_a_message_and_off_reads_only_what_was_said(tokenizer):
    as_message = [{"role": "user", "content": "Hi"}]
    assert row_encoder(tokenizer, "on")(["Hi"]) == row_encoder(tokenizer, "auto")([as_message])
    assert row_encoder(tokenizer, "off")([CHAT]) == tokenizer(["Hi\nHello!"])["input_ids"]


def test_a_tokenizer_without_a_template_says_what_to_do(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    bare = AutoTokenizer.from_pretrained(tmp_path)
    assert not has_chat_template(tmp_path)
    assert has_chat_template(MODEL_DIR)
    with pytest.raises(DataError, match=r"needs a chat template.*CALIBRATION\.CHAT_TEMPLATE to off"):
        row_encoder(bare, "auto")([CHAT])
    assert row_encoder(bare, "auto")(["text"]) == tokenizer(["text"])["input_ids"]


def test_a_template_that_refuses_a_conversation_names_its_roles(tokenizer):
    strict = AutoTokenizer.from_pretrained(MODEL_DIR)
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"refuses a row with the roles user, assistant: roles must alternate"):
        row_encoder(strict, "auto")([CHAT])


def test_conversations_stay_lists_for_calibration_and_become_text_elsewhere(tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}, {"messages": "plain"}])
    assert list(read_calibration_rows(source(path))) == [CHAT, "plain"]
    assert list(read_rows(source(path))) == ["Hi\nHello!", "plain"]


def test_a_saved_dataset_gives_rows_by_number(tmp_path):
    import datasets

    datasets.Dataset.from_list([{"messages": CHAT, "n": i} for i in range(3)]).save_to_disk(str(tmp_path / "d"))
    rows = read_calibration_rows(source(tmp_path / "d"))
    assert (len(rows), rows[2], list(rows)) == (3, CHAT, [CHAT] * 3)
    with pytest.raises(DataError, match="row 2 .* no column 'text'"):
        read_calibration_rows(source(tmp_path / "d", "text"))[1]


@pytest.mark.parametrize("value", ["text", [], ["a"], [{"role": "user"}], {"role": "user", "content": "x"}, None])
def test_what_is_no_conversation(value):
    assert not is_messages(value)


def test_prepare_writes_chats_of_different_length(tmp_path):
    from safetensors.torch import load_file

    from backend.event_stream import EventWriter
    from backend.sources.prepare import prepare
    from tests.conftest import demo_text

    path = write_jsonl(
        tmp_path / "chats.jsonl",
        [{"messages": [{"role": "user", "content": "word " * n}]} for n in (3, 100, 10)],
    )
    text = demo_text(
        DATASET_NAME=None, DATA_PATH=str(path), TEXT_COLUMN="messages", EVALUATION={"ENABLED": False},
        CALIBRATION={"SAMPLES": 8, "SEQUENCE_LENGTH": 32, "PACKING": "sample"},
    )  # fmt: skip
    with open(tmp_path / "events", "w") as stream:
        result = prepare({"home": str(tmp_path), "config": text, "out": str(tmp_path / "in")}, EventWriter(stream))
    stored = load_file(result["tokens_file"])
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    first = tokenizer.apply_chat_template([{"role": "user", "content": "word " * 3}], tokenize=False)
    expected = tokenizer(first, add_special_tokens=False)["input_ids"]
    assert stored["tokens"].shape == (3, 32)
    assert stored["lengths"].tolist()[1] == 32
    assert stored["tokens"][0, : stored["lengths"][0]].tolist() == expected
    assert stored["tokens"][0, stored["lengths"][0] :].eq(0).all()
    assert (result["samples"], result["samples_wanted"]) == (3, 8)
    assert json.loads((tmp_path / "events").read_text().splitlines()[0])["stage"] == "download"


def test_prepare_refuses_what_the_engine_cannot_do_before_it_reads_the_text(tmp_path):
    from backend.errors import ConfigErrors
    from backend.event_stream import EventWriter
    from backend.sources.prepare import prepare
    from tests.conftest import demo_text

    text = demo_text(
        ALGORITHM="LLMCompressor", llm={"LLMCompressor": {"TARGETS": "re:.*no_such.*"}}, TEXT_COLUMN="absent"
    )
    with open(tmp_path / "events", "w") as stream, pytest.raises(ConfigErrors, match="matches no Linear"):
        prepare({"home": str(tmp_path), "config": text, "out": str(tmp_path / "in")}, EventWriter(stream))
