"""What a model takes against how far it is from its base model: the points of that chart, for any page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backend.disk import BYTE_UNITS

Row = Mapping[str, Any]

BITS, SIZE = "stored bits per weight", "size of the weight files (MB)"


@dataclass(frozen=True)
class Point:
    """One quantized model.

    Attributes:
        label: For people.
        cost: Bits per weight, or MB.
        divergence: Mean KL from the base model, nats per token.
        interval: Its 95 % interval, or None.
    """

    label: str
    cost: float
    divergence: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Tradeoff:
    """The chart.

    Attributes:
        axis: What the models take.
        protocol: How their divergence was measured.
        points: At least two models.
    """

    axis: str
    protocol: str
    points: list[Point]


def tradeoff(models: Sequence[tuple[str, Sequence[Row]]]) -> Tradeoff | None:
    """The models whose divergence was measured by the protocol that most of them share, and what they take.

    Bits per weight count if all of these have them (of all Linears where some stayed in 16 bits), else their sizes.

    Args:
        models: (label, comparison rows) of each.

    Returns:
        None if there is nothing to choose between. A model without any divergence is left out: its logarithm has no
        place on the axis.
    """
    measured = [
        (label, rows, row) for label, rows in models if (row := _last(rows, "KL divergence")) and row["quantized"] > 0
    ]
    protocols = [row["protocol_id"] for _, _, row in measured]
    most = max(protocols, key=protocols.count, default=None)
    measured = [one for one in measured if one[2]["protocol_id"] == most]
    in_bits = all(_last(rows, "bits per weight") for _, rows, _ in measured)
    points = []
    for label, rows, row in measured:
        cost = _last(rows, "bits per weight" if in_bits else "size")
        if cost is not None:
            scale = 1.0 if in_bits else BYTE_UNITS[str(cost["unit"])] / 1e6
            interval = tuple(row["interval"]) if row.get("interval") else None
            points.append(Point(label, cost["quantized"] * scale, row["quantized"], interval))
    if len(points) < 2:
        return None
    return Tradeoff(BITS if in_bits else SIZE, str(measured[0][2]["protocol"]), points)


def front(points: Sequence[Point]) -> list[Point]:
    """The points that no other one beats: those that are nearer to the base model than all that take no more."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.divergence)):
        if not best or point.divergence < best[-1].divergence:
            best.append(point)
    return best


def _last(rows: Sequence[Row], metric: str) -> Row | None:
    return next((row for row in reversed(rows) if row["metric"] == metric), None)
