"""The multiple-choice task `quantdeck_demo`: questions that no text of the demo asks.

World questions ask facts that are only ever stated, sums have new operands, and sentences with a gap are new.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

from backend.demo import arithmetic, language
from backend.demo.items import Item, draw, wrong_answers
from backend.demo.world import VALUES, all_facts

SEED = 7
QUESTIONS_FILE = "questions.jsonl"
_DRAWN: dict[str, tuple[int, Callable[[random.Random], Item], Callable[[Item], bool]]] = {
    "arithmetic": (120, arithmetic.any_item, arithmetic.is_reserved),
    "language": (130, language.any_item, language.is_reserved),
}


def items(seed: int = SEED) -> list[Item]:
    """All questions of the test, every one different and every one reserved."""
    rng = random.Random(seed)
    reserved_facts = [fact for fact in all_facts() if fact.reserved]
    found = [
        Item(
            "world", f"{fact.entity.name}/{fact.attribute}", f"Question: {fact.question(rng)}", fact.value,
            wrong_answers(rng, fact.value, VALUES[fact.attribute]),
        )
        for fact in reserved_facts
    ]  # fmt: skip
    for count, make, is_reserved in _DRAWN.values():
        different: dict[str, Item] = {}
        while len(different) < count:
            item = draw(make, rng, is_reserved)
            different.setdefault(item.key, item)
        found += different.values()
    rng.shuffle(found)
    return found


def rows(seed: int = SEED) -> list[dict[str, object]]:
    """The questions as rows of the JSONL file; the right answer stands at each position equally often."""
    rng = random.Random(seed)
    built: list[dict[str, object]] = []
    for i, item in enumerate(items(seed)):
        choices = rng.sample(item.wrong, len(item.wrong))
        choices.insert(i % 4, item.answer)
        built.append({"kind": item.kind, "question": f"{item.prompt}\nAnswer:", "choices": choices, "answer": i % 4})
    return built


def write_task(folder: Path, seed: int = SEED) -> int:
    """Write the questions beside the task's YAML file; returns their number."""
    lines = [json.dumps(row) for row in rows(seed)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / QUESTIONS_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)
