"""The order in which sequences are learned."""

from __future__ import annotations

from collections import Counter

from backend.quantize.aqlm.tune.batches import Batches, microbatches


def test_every_sequence_comes_once_per_epoch() -> None:
    batches = Batches(10, 4, seed=3)
    seen = [row for step in range(10) for row in batches[step]]
    for epoch in range(4):
        assert sorted(seen[epoch * 10 : (epoch + 1) * 10]) == list(range(10))
    assert seen[:10] != seen[10:20]
    assert Counter(seen) == dict.fromkeys(range(10), 4)


def test_a_step_is_the_same_wherever_it_is_asked_from() -> None:
    batches = Batches(10, 4, seed=3)
    inorder = [batches[step] for step in range(8)]
    assert [Batches(10, 4, seed=3)[step] for step in reversed(range(8))] == inorder[::-1]
    assert [Batches(10, 4, seed=4)[step] for step in range(8)] != inorder


def test_processes_share_a_batch() -> None:
    batch = list(range(12))
    parts = [microbatches(batch, 2, rank, 3) for rank in range(3)]
    assert parts[1] == [[4, 5], [6, 7]]
    assert [row for part in parts for rows in part for row in rows] == batch
