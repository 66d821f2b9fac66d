from __future__ import annotations

import itertools
import json

import pytest

from backend.demo import TEXT_FILES, corpus
from backend.demo.dialogues import CHAT_TEMPLATE, EOS, render
from backend.demo.grammar import expand, load_phrases
from backend.demo.splits import split_of
from backend.demo.world import all_facts, asked_facts, entities


def shipped(split: str) -> list[str]:
    return [json.loads(line)["text"] for line in TEXT_FILES[split].read_text(encoding="utf-8").splitlines()]


def test_stream_is_fixed_by_its_seed():
    first = list(itertools.islice(corpus.stream(5), 60))
    assert first == list(itertools.islice(corpus.stream(5), 60))
    assert first != list(itertools.islice(corpus.stream(6), 60))


def test_shipped_train_text_is_the_beginning_of_what_is_trained_on():
    assert shipped("train")[:80] == list(itertools.islice(corpus.documents("train"), 80))


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_every_shipped_document_belongs_to_its_split(split):
    texts = shipped(split)
    assert {split_of(text) for text in texts} == {split}
    assert len(set(texts)) == len(texts)


def test_shipped_splits_are_disjoint():
    train, validation, test = (set(shipped(split)) for split in ("train", "validation", "test"))
    assert not train & validation and not train & test and not validation & test


def test_text_is_varied():
    openings = {text[:40] for text in shipped("test")}
    assert len(openings) > 0.8 * len(shipped("test"))


def test_facts_of_the_world_are_unique_and_half_are_asked():
    names = [entity.name for entity in entities()]
    assert len(names) == len(set(names))
    assert 0.45 < len(asked_facts()) / len(all_facts()) < 0.65


def test_every_template_fills(tmp_path):
    import random

    rng = random.Random(0)
    for fact in all_facts():
        for text in (fact.statement(rng, pronoun=True), fact.question(rng), fact.answer(rng)):
            assert not set("[]{}|") & set(text)
        assert fact.value in fact.answer(rng)


def test_expand_chooses_inserts_and_mends_articles():
    import random

    assert expand(random.Random(0), "{Who} ate a {what}.", who="the fox", what="apple") == "The fox ate an apple."
    chosen = {expand(random.Random(seed), "[a|b[1|2]]x") for seed in range(40)}
    assert chosen == {"ax", "b1x", "b2x"}


def test_phrases_have_statements_questions_and_answers():
    sections = load_phrases("world")
    for fact in all_facts():
        assert [len(group) for group in sections[fact.attribute]] == [len(sections[fact.attribute][0]), 4, 2]


def test_dialogues_are_written_as_the_chat_template_writes_them():
    jinja2 = pytest.importorskip("jinja2")
    turns = [("user", "Who are you?"), ("assistant", "A demo.")]
    template = jinja2.Environment().from_string(CHAT_TEMPLATE)
    messages = [{"role": role, "content": content} for role, content in turns]
    assert template.render(messages=messages, bos_token="", eos_token=EOS).strip() == render(turns)
