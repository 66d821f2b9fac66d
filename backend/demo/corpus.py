"""The demo's text: an endless seeded stream of documents, and the samples of it that are shipped.

``python -m backend.demo.corpus`` writes `data/{train,validation,test}.jsonl` (rows ``{"text": str}``) and the
multiple-choice task. `train.py` ends on the same mixture of documents.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from backend.demo import (
    DATA_DIR,
    TASK_DIR,
    TEXT_FILES,
    arithmetic,
    dialogues,
    encyclopedia,
    language,
    reading,
    recall,
    stories,
)
from backend.demo.questions import write_task
from backend.demo.splits import split_of

SEED = 20
SHIPPED_CHARACTERS = {"train": 2_500_000, "validation": 200_000, "test": 450_000}


def _story_document(rng: random.Random) -> str:
    return "\n\n".join(stories.tell(rng) for _ in range(rng.choice([1, 1, 2, 3])))


MIXTURES: dict[str, dict[Callable[[random.Random], str], int]] = {
    "even": {
        _story_document: 16,
        encyclopedia.document: 30,
        reading.exercise: 12,
        reading.drill: 14,
        arithmetic.sheet: 9,
        arithmetic.drill: 8,
        language.exercise: 6,
        recall.document: 10,
        dialogues.dialogue: 30,
    },
    "broad": {
        _story_document: 20,
        encyclopedia.document: 34,
        reading.exercise: 20,
        arithmetic.sheet: 12,
        language.exercise: 5,
        dialogues.dialogue: 30,
    },
    "drill": {
        _story_document: 10,
        encyclopedia.document: 22,
        reading.exercise: 10,
        reading.drill: 30,
        arithmetic.sheet: 10,
        arithmetic.drill: 14,
        language.exercise: 6,
        dialogues.dialogue: 28,
    },
    "echo": {
        _story_document: 8,
        encyclopedia.document: 12,
        reading.drill: 25,
        arithmetic.drill: 8,
        recall.document: 70,
        dialogues.dialogue: 14,
    },
    "recall": {
        _story_document: 9,
        encyclopedia.document: 20,
        reading.exercise: 12,
        reading.drill: 26,
        arithmetic.sheet: 8,
        arithmetic.drill: 14,
        language.exercise: 6,
        recall.document: 14,
        dialogues.dialogue: 34,
    },
}
"""How often each kind of document is made, relative to the others. The shipped text is even; the other mixtures
practise in earlier phases of the training what is hard."""


def stream(seed: int = SEED, mixture: str = "even") -> Iterator[str]:
    """Endless documents of all kinds and all splits, the same for the same seed and mixture."""
    rng = random.Random(seed)
    makers, weights = list(MIXTURES[mixture]), list(MIXTURES[mixture].values())
    while True:
        yield rng.choices(makers, weights)[0](rng)


def documents(split: str, seed: int = SEED, mixture: str = "even") -> Iterator[str]:
    """Endless different documents of one split (``"train"``, ``"validation"`` or ``"test"``)."""
    seen: set[str] = set()
    for text in stream(seed, mixture):
        if split_of(text) == split and text not in seen:
            seen.add(text)
            yield text


def take(texts: Iterator[str], characters: int) -> Iterator[str]:
    """The first texts, until together they have `characters` characters."""
    total = 0
    for text in texts:
        yield text
        total += len(text)
        if total >= characters:
            return


def write_splits(folder: Path = DATA_DIR, seed: int = SEED) -> dict[str, int]:
    """Write the three shipped files; returns the number of documents of each."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, characters in SHIPPED_CHARACTERS.items():
        rows = [json.dumps({"text": text}) for text in take(documents(split, seed), characters)]
        (folder / TEXT_FILES[split].name).write_text("\n".join(rows) + "\n", encoding="utf-8")
        counts[split] = len(rows)
    return counts


def main() -> None:
    """Write the shipped text and the multiple-choice task."""
    parser = argparse.ArgumentParser(description="Write the demo's text files and questions.")
    parser.add_argument("--seed", type=int, default=SEED)
    seed = parser.parse_args().seed
    for split, count in write_splits(seed=seed).items():
        print(f"{split}: {count} documents")
    print(f"task: {write_task(TASK_DIR)} questions")


if __name__ == "__main__":
    main()
