"""Changes of a ruamel.yaml tree that leave everything else where it is, comments included."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.scalarstring import DoubleQuotedScalarString
from ruamel.yaml.tokens import CommentToken

Leaf = tuple[CommentedMap | CommentedSeq, Any]  # a mapping or sequence and the key or index in it


def last_leaf(node: CommentedMap | CommentedSeq) -> Leaf | None:
    """What stands last in a section of the file, at any depth."""
    if not node:
        return None
    return leaf_at(node, list(node)[-1] if isinstance(node, CommentedMap) else len(node) - 1)


def leaf_at(node: CommentedMap | CommentedSeq, key: Any) -> Leaf:
    """What stands last in a value that is written as lines below its key; else the key itself."""
    child = node[key]
    is_block = isinstance(child, (CommentedMap, CommentedSeq)) and not child.fa.flow_style()
    return (last_leaf(child) if is_block else None) or (node, key)


def move_comment_below(before: Leaf, after: Leaf) -> None:
    """Lines below what was last in a section belong to what follows the section, so they go below its new end."""
    if before[0] is after[0] and before[1] == after[1]:
        return
    node, key = before
    place = 2 if isinstance(node, CommentedMap) else 0
    token = node.ca.items.get(key, [None] * 4)[place]
    if token is None or "\n" not in token.value:
        return
    head, _, below = token.value.partition("\n")
    if not below:
        return
    token.value = head + "\n"
    node, key = after
    place = 2 if isinstance(node, CommentedMap) else 0
    node.ca.items[key] = [None] * 4
    node.ca.items[key][place] = CommentToken("\n" + below, token.start_mark, None)


def node_of(value: Any) -> Any:
    """A plain value as it is written: text in quotes, a list of plain values on one line, `[4, 3]`."""
    if isinstance(value, str):
        return DoubleQuotedScalarString(value)
    if isinstance(value, Mapping):
        return CommentedMap((key, node_of(item)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        sequence = CommentedSeq(node_of(item) for item in value)
        if not any(isinstance(item, (Mapping, list, tuple)) for item in value):
            sequence.fa.set_flow_style()
        return sequence
    return value
