"""Sums, differences, comparisons, sequences and word problems with small numbers.

An operand pair that is reserved for the test appears in no training text, in no form.
"""

from __future__ import annotations

import random

from backend.demo.grammar import expand, words
from backend.demo.items import Item, draw
from backend.demo.splits import reserved
from backend.demo.stories import BOYS, GIRLS

RESERVED_PERCENT = 10
_GOODS = words("goods")
_ASK = ["What is {e}?", "How much is {e}?", "Work out {e}.", "Calculate {e}."]
_MORE = [
    "{n} has {a} {g}. {m} gives {n} {b} more. How many {g} does {n} have now?",
    "{n} picked {a} {g} and {m} picked {b}. How many {g} do they have together?",
    "There are {a} {g} in a basket. {n} puts {b} more in. How many {g} are in the basket?",
]
_LESS = [
    "{n} has {a} {g}. {n} gives {b} of them to {m}. How many {g} does {n} have left?",
    "There were {a} {g} on the table. {n} took {b}. How many {g} are still there?",
    "{n} had {a} {g} and lost {b}. How many {g} are left?",
]


def is_reserved(item: Item) -> bool:
    """True if the operands of `item` are kept for the test."""
    return reserved(item.key, RESERVED_PERCENT)


def sum_item(rng: random.Random) -> Item:
    """``a + b`` or ``a - b`` as a formula or a word problem, numbers below 100."""
    a, b = _number(rng), _number(rng)
    plus = rng.random() < 0.5
    if not plus and a < b:
        a, b = b, a
    result = a + b if plus else a - b
    sign = "+" if plus else "-"
    if rng.random() < 0.7:
        question = rng.choice(_ASK).format(e=f"{a} {sign} {b}")
    else:
        n, m = rng.choice(GIRLS), rng.choice(BOYS)
        question = rng.choice(_MORE if plus else _LESS).format(n=n, m=m, a=a, b=b, g=rng.choice(_GOODS))
    low, high = sorted((a, b))
    return _item(rng, f"{low}{sign}{high}", question, result)


def comparison_item(rng: random.Random) -> Item:
    """The largest or smallest of four numbers."""
    numbers = rng.sample(range(2, 100), 4)
    largest = rng.random() < 0.5
    word = rng.choice(["largest", "biggest"] if largest else ["smallest", "lowest"])
    answer = max(numbers) if largest else min(numbers)
    shown = ", ".join(map(str, numbers))
    key = f"{largest}{sorted(numbers)}"
    prompt = f"Question: Which number is the {word}: {shown}?"
    return Item("arithmetic", key, prompt, str(answer), tuple(str(n) for n in numbers if n != answer))


def sequence_item(rng: random.Random) -> Item:
    """The next number of an arithmetic sequence."""
    start, step = rng.randint(1, 50), rng.randint(1, 12)
    shown = ", ".join(str(start + step * i) for i in range(4))
    ask = rng.choice(["What number comes next: {e}?", "Which number follows {e}?"])
    return _item(rng, f"sequence {start} {step}", ask.format(e=shown), start + 4 * step)


def any_item(rng: random.Random) -> Item:
    """A question of any of the sorts above, mostly sums and differences."""
    make = rng.choices([sum_item, comparison_item, sequence_item], weights=[6, 1, 1])[0]
    return make(rng)


def training_item(rng: random.Random) -> Item:
    """A question that may appear in training text."""
    return draw(any_item, rng, lambda item: not is_reserved(item))


def sheet(rng: random.Random) -> str:
    """A document: a page of exercises, a times table, or counting."""
    style = rng.random()
    if style < 0.1:
        factor = rng.randint(2, 12)
        rows = "\n".join(f"{i} x {factor} = {i * factor}" for i in range(1, rng.randint(8, 12) + 1))
        return f"[The {factor} times table]\n{rows}"
    if style < 0.55:
        lines = []
        for _ in range(rng.randint(8, 30)):
            item = draw(_formula_item, rng, lambda item: not is_reserved(item))
            lines.append(f"{item.prompt} = {item.answer}")
        title = expand(rng, "[Sums for today|Sums|Exercises|Mental arithmetic|Sheet {n}]", n=str(rng.randint(1, 99)))
        return title + "\n" + "\n".join(lines)
    return "\n\n".join(training_item(rng).text for _ in range(rng.randint(3, 10)))


def drill(rng: random.Random) -> str:
    """A document: nothing but sums and differences, some written as questions."""
    lines = []
    for _ in range(rng.randint(15, 40)):
        item = draw(_formula_item, rng, lambda item: not is_reserved(item))
        asked = rng.random() < 0.3
        lines.append(
            f"Question: What is {item.prompt}?\nAnswer: {item.answer}" if asked else f"{item.prompt} = {item.answer}"
        )
    return "\n".join(lines)


def _formula_item(rng: random.Random) -> Item:
    a, b = _number(rng), _number(rng)
    sign = rng.choice("+-")
    if sign == "-" and a < b:
        a, b = b, a
    low, high = sorted((a, b))
    return Item("arithmetic", f"{low}{sign}{high}", f"{a} {sign} {b}", str(a + b if sign == "+" else a - b), ())


def _number(rng: random.Random) -> int:
    return rng.randint(1, 20) if rng.random() < 0.35 else rng.randint(2, 99)


def _item(rng: random.Random, key: str, question: str, result: int) -> Item:
    """Of the wrong answers one is a slip in the units or in the carry, two are only about as large."""
    slips = [result + slip for slip in (-11, -10, -9, -2, -1, 1, 2, 9, 10, 11) if result + slip >= 0]
    others = [number for number in range(max(0, result - 40), result + 40) if abs(number - result) > 11]
    wrong = [rng.choice(slips), *rng.sample(others, 2)]
    return Item("arithmetic", key, f"Question: {question}", str(result), tuple(map(str, wrong)))
