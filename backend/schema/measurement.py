"""Quantdeck's own, optional YAML sections: `CALIBRATION`, `EVALUATION` and `BENCHMARK`.

Their defaults reproduce what the guides do by hand, so a guide's file needs none of them.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, StrictBool, StrictInt, field_validator

from backend.schema.facts import LM_EVAL, OWN, When, unless, when
from backend.schema.fields import setting
from backend.schema.texts import DEMO

TASK_NAME = re.compile(r"^[A-Za-z0-9_\-]+$")
AUTO = "auto"
ON = when("ENABLED", True)
ON_TEXT = (unless("PROTOCOLS", None), when("FIDELITY", True))
NAMED_TEXT: list[When | tuple[When, ...]] = [ON, ON_TEXT, unless("DATASET_NAME", AUTO, DEMO)]


class CalibrationSettings(BaseModel):
    """How much calibration text is read, and in which order."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    SAMPLES: StrictInt = setting(
        128,
        label="Samples",
        section="Calibration",
        source=OWN,
        unit="sequences",
        ge=1,
        le=65536,
        help="Number of token sequences that calibrate the quantizer. 128 is AutoAWQ's own number. AQLM and "
        "TensorRTLLM read it in their own section, unless the file has this key.",
    )
    SEQUENCE_LENGTH: StrictInt = setting(
        512,
        label="Sequence length",
        section="Calibration",
        source=OWN,
        unit="tokens",
        ge=16,
        le=131072,
        help="Tokens per calibration sequence: rows of text are joined and cut to this length, or each is cut there. "
        "AQLM and TensorRTLLM read it in their own section, unless the file has this key.",
    )
    PACKING: Literal["join", "sample", "full"] = setting(
        "join",
        label="Rows",
        section="Calibration",
        source=OWN,
        advanced=True,
        help="join: rows follow one another and are cut into sequences of equal length. sample: every row is one "
        "sequence of its own, at most SEQUENCE_LENGTH long, as in llm-compressor's guides. full: the same, but rows "
        "that are shorter are left out, and too few rows of full length are an error, as in AQLM's original.",
    )
    CHAT_TEMPLATE: Literal["auto", "on", "off"] = setting(
        "auto",
        label="Chat template",
        section="Calibration",
        source=OWN,
        advanced=True,
        help="auto: rows that hold a list of messages are written out by the model's own chat template. on: a row "
        "of plain text too, as one message of the user. off: only the text of messages is read.",
    )
    SHUFFLE: StrictBool = setting(
        False,
        label="Shuffle rows",
        section="Calibration",
        source=OWN,
        advanced=True,
        help="On: rows are drawn in a random order fixed by the seed, the order of datasets' own shuffle(seed). "
        "Off: in the order of the dataset.",
    )
    SEED: StrictInt = setting(
        0,
        label="Seed",
        section="Calibration",
        source=OWN,
        visible_when=[(when("SHUFFLE", True), when("ALGORITHM", "AQLM"))],
        ge=0,
        le=2**32 - 1,
        advanced=True,
        help="Fixes the shuffling. The same file with the same seed gives the same checkpoint.",
    )

    @field_validator("CHAT_TEMPLATE", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        # YAML writers disagree on whether a bare `on` is text or True.
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class TaskSettings(BaseModel):
    """One lm-eval task."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    NAME: str = setting(label="Task", section="Evaluation", source=LM_EVAL, help="Name of an installed lm-eval task.")
    NUM_FEWSHOT: StrictInt = setting(
        0,
        label="Shots",
        section="Evaluation",
        source=LM_EVAL,
        unit="examples",
        ge=0,
        le=100,
        help="Examples shown before each question.",
    )
    LIMIT: StrictInt | None = setting(
        None,
        label="Limit",
        section="Evaluation",
        source=LM_EVAL,
        unit="questions",
        ge=1,
        help="Only the first questions; empty for all.",
    )

    @field_validator("NAME")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not TASK_NAME.match(name):
            raise ValueError("a task name has only letters, digits, '_' and '-' (paths are not accepted)")
        return name

    def __str__(self) -> str:
        limit = f":{self.LIMIT}" if self.LIMIT else ""
        return f"{self.NAME}:{self.NUM_FEWSHOT}{limit}"


def parse_task(text: str) -> dict[str, Any]:
    """Read the guides' short form `name[:shots[:limit]]`, e.g. `arc_challenge:25` or `gsm8k:5:250`.

    Raises:
        ValueError: If a number is not one, or there are too many parts.
    """
    name, *numbers = text.strip().split(":")
    if len(numbers) > 2 or not all(n.strip().isdigit() for n in numbers):
        raise ValueError(f"found {text!r}; write name, name:shots or name:shots:limit, e.g. arc_challenge:25")
    task: dict[str, Any] = {"NAME": name.strip()}
    for key, number in zip(("NUM_FEWSHOT", "LIMIT"), numbers, strict=False):
        task[key] = int(number)
    return task


class EvaluationSettings(BaseModel):
    """What is measured on the baseline and on the artefact, by one protocol for both."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    ENABLED: StrictBool = setting(
        True,
        label="Evaluate",
        section="Evaluation",
        source=OWN,
        help="Measure perplexity and accuracy of the baseline and of the quantized model after saving it.",
    )
    PROTOCOLS: list[Literal["gptq_wikitext", "full_window"]] = setting(
        default_factory=lambda: ["gptq_wikitext", "full_window"],
        choices=["gptq_wikitext", "full_window"],
        label="Perplexity protocols",
        section="Evaluation",
        source=OWN,
        visible_when=ON,
        help="gptq_wikitext is the guides' protocol (512-token windows, second half scored). "
        "full_window scores every token of every window.",
    )
    DATASET_NAME: str = setting(
        AUTO,
        label="Perplexity text",
        section="Evaluation",
        source=OWN,
        visible_when=[ON, ON_TEXT],
        advanced=True,
        help="Dataset for perplexity. 'auto': the demo text for the demo model, otherwise wikitext-2 as in the guides.",
    )
    DATASET_SUBNAME: str | None = setting(
        None,
        label="Subset",
        section="Evaluation",
        source=OWN,
        visible_when=NAMED_TEXT,
        advanced=True,
        help="Subset of the perplexity dataset.",
    )
    SPLIT: str = setting(
        "test",
        label="Split",
        section="Evaluation",
        source=OWN,
        visible_when=[
            ON,
            ON_TEXT,
            unless("DATASET_NAME", AUTO),
        ],
        advanced=True,
        help="Split for perplexity.",
    )
    TEXT_COLUMN: str = setting(
        "text",
        label="Text column",
        section="Evaluation",
        source=OWN,
        visible_when=NAMED_TEXT,
        advanced=True,
        help="Column that holds the text.",
    )
    WINDOW: StrictInt = setting(
        512,
        label="Window",
        section="Evaluation",
        source=OWN,
        visible_when=[ON, (when("PROTOCOLS", "full_window"), when("FIDELITY", True))],
        unit="tokens",
        ge=32,
        le=131072,
        advanced=True,
        help="Window of the full_window protocol and of the comparison of outputs. gptq_wikitext always uses 512.",
    )
    MAX_WINDOWS: StrictInt | None = setting(
        None,
        label="Window limit",
        section="Evaluation",
        source=OWN,
        visible_when=[ON, ON_TEXT],
        unit="windows",
        ge=2,
        help="Read only the first windows of the text; empty for all of it.",
    )
    TASKS: list[TaskSettings] | None = setting(
        None,
        label="Accuracy tasks",
        section="Evaluation",
        source=OWN,
        visible_when=ON,
        help="lm-eval tasks as name:shots[:limit], e.g. arc_challenge:25. Empty: the demo task for the demo model, "
        "otherwise the guide's arc_challenge:25. [] for none.",
    )
    FIDELITY: StrictBool = setting(
        True,
        label="Compare outputs",
        section="Evaluation",
        source=OWN,
        visible_when=ON,
        help="Measure how far the quantized model's predictions are from the baseline's on the perplexity text: mean "
        "KL divergence per token, and the share of tokens whose most likely successor changes.",
    )
    FIDELITY_WINDOWS: StrictInt = setting(
        64,
        label="Windows to compare",
        section="Evaluation",
        source=OWN,
        visible_when=[ON, when("FIDELITY", True)],
        unit="windows",
        ge=2,
        le=65536,
        advanced=True,
        help="Windows of WINDOW tokens, evenly spread over the text, on which outputs are compared. 8 and more give an "
        "interval.",
    )
    BATCH_SIZE: StrictInt = setting(
        8,
        label="Batch size",
        section="Evaluation",
        source=OWN,
        visible_when=ON,
        unit="sequences",
        ge=1,
        le=1024,
        advanced=True,
        help="Sequences per forward pass while evaluating.",
    )

    @property
    def compares_outputs(self) -> bool:
        """Whether KL divergence and flips are measured."""
        return self.ENABLED and self.FIDELITY

    @property
    def needs_text(self) -> bool:
        """Whether anything is measured on the perplexity text."""
        return self.ENABLED and bool(self.PROTOCOLS or self.FIDELITY)

    @field_validator("TASKS", mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part for part in value.split(",") if part.strip()]
        if isinstance(value, list):
            return [parse_task(item) if isinstance(item, str) else item for item in value]
        return value


class BenchmarkSettings(BaseModel):
    """Throughput and memory of both models at batch 1, measured in turns."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    ENABLED: StrictBool = setting(
        True,
        label="Benchmark",
        section="Benchmark",
        source=OWN,
        help="Measure prefill and decode speed and peak memory of both models.",
    )
    PROMPT_TOKENS: StrictInt = setting(
        128, label="Prompt", section="Benchmark",
        source=OWN, visible_when=ON,
        unit="tokens", ge=1, le=131072, advanced=True,
        help="Length of the prompt that is prefilled.",
    )  # fmt: skip
    NEW_TOKENS: StrictInt = setting(
        64, label="Decode", section="Benchmark",
        source=OWN, visible_when=ON,
        unit="tokens", ge=2, le=131072, advanced=True,
        help="Tokens generated one by one after the prompt.",
    )  # fmt: skip
    WARMUP: StrictInt = setting(
        2, label="Warm-up", section="Benchmark",
        source=OWN, visible_when=ON, unit="runs", ge=0, le=100, advanced=True,
        help="Runs of each model that are thrown away.",
    )  # fmt: skip
    REPETITIONS: StrictInt = setting(
        7, label="Repetitions", section="Benchmark",
        source=OWN, visible_when=ON, unit="runs", ge=3, le=1000, advanced=True,
        help="Measured runs of each model, in turns; the median and its 95 % interval are reported.",
    )  # fmt: skip
