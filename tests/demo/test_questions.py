from __future__ import annotations

import collections
import itertools
import json
import random
import re

from backend.demo import TASK_DIR, TASK_NAME, TEXT_FILES, corpus, questions, reading
from backend.demo.arithmetic import is_reserved, sheet, sum_item
from backend.demo.splits import reserved


def shipped_rows() -> list[dict]:
    return [json.loads(line) for line in (TASK_DIR / questions.QUESTIONS_FILE).read_text("utf-8").splitlines()]


def test_shipped_questions_are_what_the_generator_makes():
    assert shipped_rows() == questions.rows()


def test_there_are_enough_valid_questions():
    rows = shipped_rows()
    assert len(rows) >= 500
    assert len({row["question"] for row in rows}) == len(rows)
    for row in rows:
        assert len(set(row["choices"])) == 4 and all(row["choices"])
        assert 0 <= row["answer"] < 4
        assert row["question"].endswith("\nAnswer:")


def test_right_answers_stand_equally_often_at_each_position():
    counts = collections.Counter(row["answer"] for row in shipped_rows())
    assert max(counts.values()) - min(counts.values()) <= 1


def test_answers_are_right():
    for row in shipped_rows():
        found = re.search(r"(\d+) ([+-]) (\d+)[?.]", row["question"]) if row["kind"] == "arithmetic" else None
        if found:
            a, sign, b = int(found[1]), found[2], int(found[3])
            assert row["choices"][row["answer"]] == str(a + b if sign == "+" else a - b)


def test_no_test_question_is_asked_in_any_text():
    asked = [row["question"].removesuffix("\nAnswer:") for row in shipped_rows()]
    texts = [json.loads(line)["text"] for file in TEXT_FILES.values() for line in file.open(encoding="utf-8")]
    everything = "\n".join(texts)
    for question in asked:
        bare = question.removeprefix("Question: ").removeprefix("Complete the sentence: ")
        assert bare not in everything, question


def test_reserved_operands_appear_in_no_form():
    rng = random.Random(3)
    texts = [sheet(rng) for _ in range(60)] + list(itertools.islice(corpus.documents("train", seed=99), 300))
    for a, sign, b in re.findall(r"(\d+) ([+-]) (\d+)", "\n".join(texts)):
        low, high = sorted((int(a), int(b)))
        assert not reserved(f"{low}{sign}{high}", 10), f"{a} {sign} {b}"
    assert any(is_reserved(sum_item(rng)) for _ in range(200))


def test_reading_answers_stand_in_the_passage_with_their_rivals():
    rng = random.Random(4)
    for _ in range(50):
        item = reading.any_item(rng)
        passage = item.prompt.partition("\nQuestion:")[0]
        assert item.answer in passage and all(wrong in passage for wrong in item.wrong)


def test_lm_eval_reads_the_task_from_its_folder():
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(TASK_DIR), include_defaults=False)
    task = manager.load([TASK_NAME])["tasks"][TASK_NAME]
    docs = list(task.test_docs())
    assert len(docs) == len(shipped_rows())
    assert task.doc_to_text(docs[0]) == docs[0]["question"]
    assert task.doc_to_choice(docs[0]) == docs[0]["choices"]
    assert task.doc_to_target(docs[0]) == docs[0]["answer"]
