"""A changed file in the spelling of the file that was read: lines that say the same stay as they were, to the letter.

ruamel.yaml writes what it read in its own way: without blanks at line ends, an empty value as the file's others, lists
at its own depth. What it writes for the file as it was shows which of its lines are which of the file's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher

BOM = "\ufeff"
MOST = 200_000  # pairs of lines that are compared; a job file that differs in more is written anew


def keep_lines(original: str, before: str, after: str) -> str:
    """The file after a change, line by line as it was read wherever nothing changed.

    Args:
        original: The file as it was read.
        before: The same as it is written anew without the change.
        after: As it is written anew with the change.
    """
    end = "\r\n" if "\r\n" in original else "\n"
    source = original.removeprefix(BOM).splitlines(keepends=True)
    written, changed = before.splitlines(), after.splitlines()
    spelt = _spelt(source, written)
    lines: list[str] = []
    for tag, i, j, k, m in _steps(written, changed):
        if tag != "equal":
            lines += [line + end for line in changed[k:m]]
            continue
        at = i
        while at < j:
            first, last, own = spelt[at]
            whole = first >= i and last <= j
            lines += own if whole else [line + end for line in written[at : min(last, j)]]
            at = min(last, j)
    text = "".join(lines)
    if source and not source[-1].endswith(("\n", "\r")):
        text = text.removesuffix(end)
    return BOM + text if original.startswith(BOM) else text


def _spelt(source: Sequence[str], written: Sequence[str]) -> list[tuple[int, int, list[str]]]:
    """For each written line the first and the last of those that belong together with it, and the file's own."""
    found: list[tuple[int, int, list[str]]] = []
    waiting: list[str] = []  # lines of the file that are not written; they stand before the next one that is
    for _, i, j, k, m in _steps(written, source):
        if i == j:
            waiting += source[k:m]
        elif j - i == m - k:
            for n in range(j - i):
                found.append((i + n, i + n + 1, [*waiting, source[k + n]]))
                waiting = []
        else:
            found += [(i, j, [*waiting, *source[k:m]])] * (j - i)
            waiting = []
    if waiting and found:
        first, last, own = found[-1]
        found[first:] = [(first, last, [*own, *waiting])] * (last - first)
    return found


def _steps(one: Sequence[str], other: Sequence[str]) -> Iterator[tuple[str, int, int, int, int]]:
    """How one list of lines becomes the other, blanks at line ends aside: as `SequenceMatcher.get_opcodes`."""
    a, b = [line.rstrip() for line in one], [line.rstrip() for line in other]
    shorter = min(len(a), len(b))
    head = next((n for n in range(shorter) if a[n] != b[n]), shorter)
    tail = next((n for n in range(shorter - head) if a[-1 - n] != b[-1 - n]), shorter - head)
    end, last = len(a) - tail, len(b) - tail
    if head:
        yield "equal", 0, head, 0, head
    if (end - head) * (last - head) > MOST:
        yield "replace", head, end, head, last
    else:
        for tag, i, j, k, m in SequenceMatcher(None, a[head:end], b[head:last], autojunk=False).get_opcodes():
            yield tag, head + i, head + j, head + k, head + m
    if tail:
        yield "equal", end, len(a), last, len(b)
