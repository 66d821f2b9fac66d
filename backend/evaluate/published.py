"""Figures that the guides publish, word for word: for reading beside measured ones, never for calculating with them.

They were found on other hardware, by other programs and under protocols of which the guides say little. Quantdeck
therefore shows them in tables of their own and draws none of them.

Sources: the guides of Nyuntam, and the survey arXiv 2402.01799 that the one on TensorRT-LLM quotes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

NOT_STATED = "not stated"
CAPTION = (
    "Figures that others published, of other models and other hardware. They say what to expect, not what happened "
    "here: none of them may be set against a number measured by Quantdeck, and none is drawn in a chart."
)


@dataclass(frozen=True)
class Column:
    """One kind of number of a table.

    Attributes:
        name: What it is.
        unit: Of all its values; empty for a number without one.
        higher_is_better: Direction of improvement.
    """

    name: str
    unit: str
    higher_is_better: bool

    @property
    def heading(self) -> str:
        """Name, unit and direction."""
        return f"{self.name}{f' ({self.unit})' if self.unit else ''} {'↑' if self.higher_is_better else '↓'}"


@dataclass(frozen=True)
class Row:
    """One model as published.

    Attributes:
        runtime: What ran it; `NOT_STATED` where the source does not tell.
        label: How it was quantized.
        values: One per column, None where the source has no number.
    """

    runtime: str
    label: str
    values: tuple[float | None, ...]


@dataclass(frozen=True)
class PublishedTable:
    """One published table.

    Attributes:
        heading: What it compares.
        model: Whose figures these are.
        hardware: As far as the source states it.
        source: Who published it, in words.
        url: Where; empty for a guide that has no stable address.
        columns: Its kinds of numbers.
        rows: Its models.
        remark: What a reader has to know.
    """

    heading: str
    model: str
    hardware: str
    source: str
    url: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    remark: str = ""


_SIZE = Column("Size", "GB", False)
_PERPLEXITY = Column("Perplexity", "", False)
_GSM8K = Column("GSM8K, 5-shot", "%", True)

TABLES: tuple[PublishedTable, ...] = (
    PublishedTable(
        "Llama-2-7B on TensorRT-LLM and on Text Generation Inference",
        "meta-llama/Llama-2-7b-hf", NOT_STATED,
        "Faster and Lighter LLMs: A Survey on Current Challenges and Way Forward, arXiv 2402.01799; as in the guide on "
        "TensorRT-LLM",
        "https://arxiv.org/abs/2402.01799",
        (
            Column("Weight memory (WM)", "GB", False), Column("Running memory (RM)", "GB", False),
            Column("Decode", "tokens/s", True), _PERPLEXITY,
        ),
        (
            Row("TensorRT-LLM", "AWQ GEMM, 4 bits (int4_awq)", (3.42, 5.69, 194.86, 6.02)),
            Row("TensorRT-LLM", "INT8 (int8)", (6.53, 8.55, 143.57, 5.89)),
            Row("TensorRT-LLM", "FP16", (12.55, 14.61, 83.43, 5.85)),
            Row("TGI", "AWQ GEMM, 4 bits", (3.62, 36.67, 106.84, 6.02)),
            Row("TGI", "FP16", (12.55, 38.03, 74.19, 5.85)),
        ),
        "TGI reserves GPU memory for its cache in advance, so its RM says little about the model.",
    ),
    PublishedTable(
        "AWQ, 4 bits in groups of 128", "meta-llama/Meta-Llama-3.1-8B-Instruct", NOT_STATED,
        "The guide on AWQ (AutoAWQ, GEMV)", "",
        (
            Column("Perplexity (gptq_wikitext)", "", False), Column("ARC-Challenge, 25-shot", "%", True), _SIZE,
        ),
        (
            Row(NOT_STATED, "16 bits", (7.32, 60.66, 15.0)),
            Row("AutoAWQ", "AWQ, 4 bits", (7.69, 59.73, 5.4)),
        ),
        "Another guide gives 6.14 for the same unquantized model and protocol.",
    ),
    PublishedTable(
        "AQLM with PV-tuning, 2 bits", "RLHFlow/LLaMA3-iterative-DPO-final", NOT_STATED,
        "The guide on AQLM", "",
        (_GSM8K,),
        (
            Row(NOT_STATED, "Llama3-8b, 16 bits", (50.9,)),
            Row("AQLM", "2 bits, PV-tuned", (58.9,)),
        ),
        "The 16-bit row is another model, not the one that was quantized. The guide's first version "
        "gives 78.99 for that one: quantizing it cost 20.1 points.",
    ),
    PublishedTable(
        "GPTQ, 4 bits in groups of 128 (W4A16)", "meta-llama/Meta-Llama-3-8B-Instruct", NOT_STATED,
        "The guide on llm-compressor (vLLM, 250 questions)", "",
        (
            Column("GSM8K, 5-shot, flexible match", "", True), Column("GSM8K, 5-shot, strict match", "", True),
        ),
        (Row("vLLM", "GPTQ, 4 bits", (0.728, 0.720)),),
        "No figure of the unquantized model is given. Standard errors: 0.0282 and 0.0285.",
    ),
)  # fmt: skip


def to_json() -> str:
    """All tables as a JSON array of objects."""
    return json.dumps([asdict(table) for table in TABLES], indent=2)


def to_markdown() -> str:
    """All tables for people, each with its model, hardware and source."""
    parts = [CAPTION]
    for table in TABLES:
        lines = [
            "| " + " | ".join(("Runtime", "Quantized", *(column.heading for column in table.columns))) + " |",
            "|---|---|" + "---|" * len(table.columns),
            *("| " + " | ".join((row.runtime, row.label, *map(shown, row.values))) + " |" for row in table.rows),
        ]
        parts.append(f"## {table.heading}\n\n" + "\n".join(lines) + "\n\n" + origin(table))
    return "\n\n".join(parts)


def to_csv() -> str:
    """One line per number."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("table", "model", "hardware", "source", "runtime", "quantized", "metric", "unit", "published"))
    for table in TABLES:
        for row in table.rows:
            named: tuple[Any, ...] = (table.heading, table.model, table.hardware, table.source, row.runtime, row.label)
            for column, value in zip(table.columns, row.values, strict=True):
                writer.writerow((*named, column.name, column.unit, "" if value is None else value))
    return stream.getvalue().rstrip("\n")


def origin(table: PublishedTable) -> str:
    """Model, hardware, source and remark of a table, in words."""
    where = f" <{table.url}>" if table.url else ""
    remark = f" {table.remark}" if table.remark else ""
    return f"Model: {table.model}. Hardware: {table.hardware}. Source: {table.source}{where}.{remark}"


def shown(value: float | None) -> str:
    """A number without trailing zeros, a dash where there is none."""
    return "–" if value is None else f"{value:g}"


RENDERERS: dict[str, Callable[[], str]] = {"json": to_json, "markdown": to_markdown, "csv": to_csv}
