"""Streaming text never shows half a character and adds up to the whole."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from backend.chat.detokenize import IncrementalDecoder
from backend.chat.stopping import StopText
from tests.evaluate.tiny import make_tokenizer

TEXT = "naïve Grüße — 漢字かな 🙂👩‍👩‍👧 the river. " * 6


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer: words with a leading mark, anything else as bytes."""
    vocabulary = {f"<0x{i:02X}>": i for i in range(256)} | {"▁the": 256, "▁river": 257, "▁": 258, "<unk>": 259}
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    vocabulary |= {piece: 260 + i for i, piece in enumerate(["t", "h", "e", "▁t", "▁th"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(
    "tokenizer", [make_tokenizer(), byte_fallback_tokenizer()], ids=["byte-level", "byte-fallback"]
)
def test_pieces_add_up_without_replacement_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) > 200  # most characters take several tokens
    decoder = IncrementalDecoder(lambda ids: tokenizer.decode(ids, clean_up_tokenization_spaces=False))
    pieces = [decoder.add(token) for token in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert sum(piece != "" for piece in pieces) > 100  # it streams


def test_a_real_replacement_character_arrives_with_what_follows_it() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("a\ufffdb", add_special_tokens=False)["input_ids"]
    decoder = IncrementalDecoder(tokenizer.decode)
    pieces = [decoder.add(token) for token in ids]
    assert "".join(pieces) == "a\ufffdb"
    assert pieces[-1] == "\ufffdb"


def test_incomplete_last_character_is_left_out() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("ok 漢", add_special_tokens=False)["input_ids"][:-1]
    decoder = IncrementalDecoder(tokenizer.decode)
    assert "".join(decoder.add(token) for token in ids) == "ok "


def test_stop_text_is_found_across_pieces_and_not_shown() -> None:
    stop = StopText("\nUser:")
    assert [stop.add(piece) for piece in ["Hello", "\nUs", "e", "r: next"]] == ["Hello", "", "", ""]
    assert stop.found and stop.rest() == ""


def test_a_false_start_of_the_stop_text_is_shown_after_all() -> None:
    stop = StopText("\nUser:")
    assert [stop.add(piece) for piece in ["a\nUs", "age", "\n"]] == ["a", "\nUsage", ""]
    assert not stop.found and stop.rest() == "\n"
