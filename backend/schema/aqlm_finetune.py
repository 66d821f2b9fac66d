"""`llm.AQLM.finetune_config`: tuning of the whole model against the original (PV-tuning), and its text.

Names and defaults are the guide's; `FINETUNE_DATA` is ours: the guide calibrates on one text and tunes on another, by
changing the file in between.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, StrictBool, StrictFloat, StrictInt, field_validator, model_validator

from backend.schema.aqlm_calibration import OWN_CODE, SENDS_NOTHING, Attention, no_effect
from backend.schema.errors import ProblemAt
from backend.schema.facts import AQLM_GUIDE, OWN, When, unless, when
from backend.schema.fields import drop_empty, setting
from backend.schema.texts import DEMO, check_columns, check_format, column_names

TUNING = "AQLM tuning"
TUNING_TEXT = "AQLM tuning text"
UPDATES = ("update_codes", "update_codebooks_and_scales", "update_non_quantized_parameters")
CODE_BITS = {"uint8": 8, "int8": 7, "int16": 15, "uint16": 16, "int32": 31, "int64": 63}
"""Bits of the largest code that a type holds."""

TUNED = unless("max_epochs", 0)
CODES = [TUNED, when("update_codes", True)]
TUNED_TEXT = unless("llm.AQLM.finetune_config.max_epochs", 0)
NAMED: list[When | tuple[When, ...]] = [TUNED_TEXT, (unless("DATASET_NAME", None, DEMO), unless("DATA_PATH", None))]

tuning = partial(setting, section=TUNING, source=AQLM_GUIDE, visible_when=TUNED)
tuning_text = partial(setting, section=TUNING_TEXT, source=OWN, visible_when=TUNED_TEXT)


class FinetuneConfig(BaseModel):
    """Tuning of the whole model: its outputs are drawn to the original's (KL divergence) on text.

    Source: Malinovskii et al. 2024 (PV-Tuning, arXiv 2405.14852) and the guide.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    # -- how much
    max_epochs: StrictInt = tuning(
        10, label="Epochs", visible_when=(), unit="epochs", ge=0, le=100_000,
        help="Passes over the tuning text at most; the best model on the validation text is kept. 0: no tuning, the "
        "calibrated model is the only result.",
    )  # fmt: skip
    update_codes: StrictBool = tuning(
        True, label="Change codes",
        help="The V step: codes may change. Off: only codebooks, scales and the rest are tuned, which is cheaper.",
    )  # fmt: skip
    update_codebooks_and_scales: StrictBool = tuning(
        True, label="Change codebooks and scales", help="The P step: codebooks and scales are tuned."
    )
    update_non_quantized_parameters: StrictBool = tuning(
        True, label="Change the rest", help="Norms, embeddings and the head are tuned, too."
    )
    batch_size: StrictInt = tuning(
        128, label="Batch", unit="sequences", ge=1, le=65536,
        help="Sequences per step, over all GPUs. A multiple of the part below times the number of GPUs.",
    )  # fmt: skip
    microbatch_size: StrictInt | None = tuning(
        None, label="Part of a batch", unit="sequences", ge=1, le=65536, empty="4096 tokens",
        help="Sequences of a batch that a GPU computes at once; smaller takes less memory.",
    )  # fmt: skip
    lr: StrictFloat = tuning(
        0.0001, label="Learning rate", ge=1e-9, le=1.0, help="Step for codebooks, scales, norms, embeddings and head."
    )
    code_lr: StrictFloat = tuning(
        0.001, label="Learning rate of codes", visible_when=CODES, ge=1e-9, le=1.0,
        help="Step of the buffer that decides which codes change. With LAMB a part of the weight's size.",
    )  # fmt: skip
    max_code_change_per_step: StrictFloat = tuning(
        0.01,
        label="Codes changed per step",
        visible_when=CODES,
        ge=1e-6,
        le=1.0,
        help="At most this part of a Linear's codes per step.",
    )
    code_trust_ratio: StrictFloat = tuning(
        0.01, label="Weight change per step", visible_when=CODES, ge=1e-6, le=1000.0,
        help="At most this relative change of a Linear's weights by new codes per step.",
    )  # fmt: skip
    eval_every_steps: StrictInt = tuning(
        15, label="Validate every", unit="steps", ge=1, le=1_000_000,
        help="The divergence on the validation text is measured so often; the best model is kept.",
    )  # fmt: skip
    # -- ours
    CODEBOOK_LR: StrictFloat | None = tuning(
        None, label="Learning rate of codebooks",
        source=OWN, visible_when=[TUNED, when("update_codebooks_and_scales", True)],
        ge=1e-9, le=1.0, advanced=True, empty="the learning rate",
        help="Step for codebooks and scales, where it is to be another one than that of norms, embeddings and head.",
    )  # fmt: skip
    P_ONLY_EPOCHS: StrictInt = tuning(
        0, label="Epochs without new codes",
        source=OWN, visible_when=CODES, unit="epochs", ge=0, le=100_000, advanced=True,
        help="So many epochs come first in which the codes stay and only the rest is tuned.",
    )  # fmt: skip
    LR_SCHEDULE: Literal["constant", "cosine"] = tuning(
        "constant", label="Learning rates over time", source=OWN, advanced=True,
        help="cosine: both learning rates fall to nothing along half a cosine.",
    )  # fmt: skip
    WARMUP_STEPS: StrictInt = tuning(
        0, label="Warm-up", source=OWN, unit="steps", ge=0, le=1_000_000, advanced=True,
        help="Steps over which both learning rates rise from nothing.",
    )  # fmt: skip
    EARLY_STOP: StrictInt | None = tuning(
        None, label="Early stop", source=OWN, unit="validations", ge=1, le=1_000_000, advanced=True, empty="never",
        help="Tuning ends after so many validations in a row without a better one.",
    )  # fmt: skip
    # -- optimizer
    lamb: StrictBool = tuning(
        True, label="LAMB", advanced=True, help="On: steps are scaled by the size of what they change. Off: Adam's own."
    )
    debias: StrictBool = tuning(
        True, label="Correct the start", visible_when=[TUNED, when("lamb", False)], advanced=True,
        help="On: Adam's means are corrected for their start at zero. Without effect with LAMB.",
    )  # fmt: skip
    amsgrad: StrictBool = tuning(
        False, label="AMSGrad", advanced=True, help="On: Adam divides by the largest mean squared gradient so far."
    )
    adam_beta1: StrictFloat = tuning(
        0.9, label="Adam's beta 1", ge=0.0, le=0.999999, advanced=True, help="Memory of the mean gradient."
    )
    adam_beta2: StrictFloat = tuning(
        0.95, label="Adam's beta 2", ge=0.0, le=0.999999, advanced=True, help="Memory of the mean squared gradient."
    )
    code_beta1: StrictFloat = tuning(
        0.0, label="Beta 1 of codes", visible_when=CODES, ge=0.0, le=0.999999, advanced=True,
        help="As Adam's beta 1, for the buffer of the codes; 0 saves memory.",
    )  # fmt: skip
    code_beta2: StrictFloat = tuning(
        0.95, label="Beta 2 of codes", visible_when=CODES, ge=0.0, le=0.999999, advanced=True,
        help="As Adam's beta 2, for the buffer of the codes.",
    )  # fmt: skip
    delta_decay: StrictFloat = tuning(
        0.0, label="Decay of the buffer", visible_when=CODES, ge=0.0, le=1.0, advanced=True,
        help="How much of the buffer returns to the present weights after each step: 0 keeps all of it, 1 nothing.",
    )  # fmt: skip
    force_code_update: StrictBool = tuning(
        False, label="Force a change", visible_when=CODES, advanced=True,
        help="On: the chosen codes have to change, if need be to the second best. Of use with a decay of 1.",
    )  # fmt: skip
    beam_size: StrictInt = tuning(
        1, label="Beam", visible_when=CODES, unit="paths", ge=1, le=65536, advanced=True,
        help="Paths that the search for new codes keeps; with several codebooks 5 finds better ones.",
    )  # fmt: skip
    # -- types and memory
    gradient_checkpointing: StrictBool = tuning(
        True, label="Gradient checkpointing", advanced=True,
        help="On: layers are computed twice, and activations of one layer are in memory. Less memory, more time.",
    )  # fmt: skip
    amp_dtype: Literal["float32", "bfloat16", "float16", "auto"] = tuning(
        "float32", label="Type of the passes", advanced=True,
        help="Type of the forward and backward passes. auto, which is ours: bfloat16 where the device is fast in it, "
        "else float32.",
    )  # fmt: skip
    master_dtype: Literal["float32", "bfloat16", "float16"] = tuning(
        "float32", label="Type of the parameters", advanced=True, help="Type of the parameters that are tuned."
    )
    straight_through_buffer_dtype: Literal["float32", "bfloat16", "float16"] = tuning(
        "float32",
        label="Type of the buffer",
        visible_when=CODES,
        advanced=True,
        help="Type of the buffer of the codes.",
    )
    code_adam_16bit: StrictBool = tuning(
        False,
        label="16-bit state of codes",
        visible_when=CODES,
        advanced=True,
        help="On: Adam's state of the codes has 16 bits.",
    )
    minimize_sync: StrictBool = tuning(
        False, label="Sum gradients once", advanced=True,
        help="With several GPUs. On: their gradients are summed once per step instead of after every part of a batch.",
    )  # fmt: skip
    seed: StrictInt = tuning(
        1337, label="Seed of tuning", ge=0, le=2**32 - 1, advanced=True, help="Fixes the order of the tuning text."
    )
    save_every_steps: StrictInt = tuning(
        10, label="Save every", unit="steps", ge=1, le=1_000_000, advanced=True,
        help="The state is saved so often; after an interruption tuning goes on from there.",
    )  # fmt: skip
    block_type: str | None = tuning(
        None, label="Class of a layer", advanced=True,
        help="Name of the model's decoder layer, LlamaDecoderLayer in the guide. Empty: found in the model. Another "
        "one than the model has is refused.",
    )  # fmt: skip
    model_seqlen: StrictInt = tuning_text(
        4096, label="Sequence length", source=AQLM_GUIDE, unit="tokens", ge=16, le=131072,
        help="Tokens per sequence of the tuning text; rows are joined and cut to it.",
    )  # fmt: skip
    # -- without effect
    attn_implementation: Attention | None = no_effect(
        None, label="Attention (tuning)", help="Attention is computed by the means that suit the device."
    )
    code_selection_temperature: StrictFloat = no_effect(
        0.0, label="Temperature of the choice", ge=0.0, le=1000.0,
        help="The codes with the largest wish to change are changed; the original drops this value, too.",
    )  # fmt: skip
    code_dtype: Literal["uint8", "int8", "int16", "uint16", "int32", "int64"] = no_effect(
        "uint16", label="Type of codes (tuning)",
        help="Codes are held in 32 bits and stored in 8 or 16. A type that does not hold all of them is refused.",
    )  # fmt: skip
    download_num_workers: StrictInt | None = no_effect(
        None, label="Download workers", unit="processes", ge=1, le=1024, help="Text is read by one process."
    )
    eval_datasets: list[str] = no_effect(
        default_factory=lambda: ["wikitext2", "c4"], label="Evaluation texts",
        help="The original picks its model on the first of these, a test text. Here a validation part of the tuning "
        "text decides, and EVALUATION says what is measured.",
    )  # fmt: skip
    keep_best_model: StrictBool = no_effect(
        True, label="Keep the best model", help="The best model on the validation text is always the result."
    )
    limit_parallel_inits: StrictInt = no_effect(
        4, label="Parallel loading", unit="processes", ge=1, le=1024, help="Processes share one copy while they load."
    )
    load_dtype: Literal["auto", "float16", "float32", "bfloat16"] = no_effect(
        "float32", label="Type of loading", help="Weights are loaded as they are stored, then computed with."
    )
    monkeypatch_old_pickle: StrictBool = no_effect(
        False, label="Old pickles", help="True is refused: pickles are not read, they can run code."
    )
    num_workers: StrictInt = no_effect(
        8, label="Loader workers", unit="processes", ge=0, le=1024, help="The text is tokenized once, before tuning."
    )
    overwrite_cache: StrictBool = no_effect(
        False, label="Overwrite the cache", help="Tokens belong to their job and are made anew when the text changes."
    )
    preprocessing_chunk_length: StrictInt | None = no_effect(
        None, label="Chunk length", unit="characters", ge=1, le=10_000_000, help="Rows are tokenized as they are."
    )
    preprocessing_keep_in_memory: StrictBool = no_effect(
        False, label="Keep text in memory", help="Rows are read one after another and never all held."
    )
    preprocessing_num_workers: StrictInt = no_effect(
        24, label="Tokenizer workers", unit="processes", ge=1, le=1024, help="The tokenizer uses all cores by itself."
    )
    print_every_steps: StrictInt = no_effect(
        1, label="Print every (tuning)", unit="steps", ge=1, le=1_000_000, help="The job's page tells every step."
    )
    skip_grouping: StrictBool = no_effect(
        False, label="Skip grouping", help="Rows are always joined and cut to sequences of equal length."
    )
    trust_remote_code: StrictBool = no_effect(False, label="Trust code (tuning)", help=OWN_CODE)
    use_fast_tokenizer: StrictBool = no_effect(
        False, label="Fast tokenizer (tuning)", help="The model's own tokenizer is used, fast where there is one."
    )
    use_fsdp_amp: StrictBool = no_effect(
        False, label="Mixed precision of FSDP", help="The type of the passes is the one above, however many GPUs."
    )
    verbose_optimizer: StrictBool = no_effect(
        False, label="Talkative optimizer", help="The part of the codes that changed is told at every step."
    )
    wandb: StrictBool = no_effect(False, label="Weights & Biases (tuning)", help=SENDS_NOTHING)
    wrap_separately: list[str] = no_effect(
        default_factory=list, label="Wrapped on their own", help="How parameters are spread over GPUs is decided here."
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, values: Any) -> Any:
        return drop_empty(values)

    @field_validator("eval_datasets", "wrap_separately", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _fits_together(self) -> FinetuneConfig:
        if self.monkeypatch_old_pickle:
            raise ProblemAt("monkeypatch_old_pickle", "found True; pickles are not read; set it to False", True)
        if self.max_epochs and not self.updates:
            raise ProblemAt(
                "update_codes",
                f"found False beside {' and '.join(f'{key} False' for key in UPDATES[1:])}; nothing would be tuned: "
                "set one of the three to True, or max_epochs to 0 for no tuning",
                False,
            )
        if 0 < self.max_epochs < self.P_ONLY_EPOCHS:
            raise ProblemAt(
                "P_ONLY_EPOCHS",
                f"found {self.P_ONLY_EPOCHS}, and max_epochs is {self.max_epochs}; allowed are 0 to {self.max_epochs}",
                self.P_ONLY_EPOCHS,
            )
        if self.max_epochs and self.microbatch_size and self.batch_size % self.microbatch_size:
            raise ProblemAt(
                "microbatch_size",
                f"found {self.microbatch_size}, which does not divide batch_size {self.batch_size}; change one of them",
                self.microbatch_size,
            )
        return self

    @property
    def updates(self) -> bool:
        """Whether there is anything to be tuned."""
        return any(getattr(self, key) for key in UPDATES)

    @property
    def tunes(self) -> bool:
        """Whether the job tunes."""
        return self.max_epochs > 0 and self.updates


class FinetuneData(BaseModel):
    """The text that tuning reads. Without a dataset, preset or path: the job's own calibration text."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    PRESET: Literal["gsm8k_restructured"] | None = tuning_text(
        None, label="Preset",
        help="gsm8k_restructured: the guide's text, openai/gsm8k as 'Question: ... Answer: ...'. It is read from "
        "DATA_PATH if that is given, else from USER_FOLDER/datasets/gsm8k_restructured where that exists, else from "
        "the Hub.",
    )  # fmt: skip
    DATASET_NAME: str | None = tuning_text(
        None, label="Dataset", help="A dataset id on the Hub, or 'quantdeck/demo' for the built-in text."
    )
    DATASET_SUBNAME: str | None = tuning_text(
        None,
        label="Subset",
        visible_when=[TUNED_TEXT, when("DATA_PATH", None), unless("DATASET_NAME", None, DEMO)],
        advanced=True,
        help="Subset (configuration) of the dataset.",
    )
    SPLIT: str = tuning_text(
        "train",
        label="Split",
        visible_when=[TUNED_TEXT, (unless("DATASET_NAME", None), unless("DATA_PATH", None), unless("PRESET", None))],
        help="Split that is read, e.g. train.",
    )
    TEXT_COLUMN: str = tuning_text(
        "text", label="Text column", visible_when=NAMED, advanced=True,
        help="Column with the text; several, separated by commas, need a format string.",
    )  # fmt: skip
    DATA_PATH: str | None = tuning_text(
        None, label="Local data", advanced=True,
        help="Local dataset instead of a download: a folder saved by datasets, or a .jsonl, .csv, .parquet or .txt "
        "file.",
    )  # fmt: skip
    FORMAT_STRING: str | None = tuning_text(
        None, label="Format string",
        visible_when=[TUNED_TEXT, (unless("DATASET_NAME", None), unless("DATA_PATH", None))],
        advanced=True,
        help="Template over the text columns, e.g. \"Question: {question}\\nAnswer: {answer}\".",
    )  # fmt: skip
    SAMPLES: StrictInt | None = tuning_text(
        None, label="Tuning sequences", unit="sequences", ge=2, le=1_000_000, empty="as many as calibrate",
        help="Token sequences that are read, the validation's included; fewer if the text ends before.",
    )  # fmt: skip
    VAL_SAMPLES: StrictInt | None = tuning_text(
        None, label="Validation sequences", unit="sequences", ge=1, le=65536, empty="as in calibration",
        help="The last sequences, on which nothing is tuned: they decide which step's model is kept. Empty: as many "
        "as in calibration, but at most a quarter.",
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, values: Any) -> Any:
        return drop_empty(values)

    @field_validator("TEXT_COLUMN")
    @classmethod
    def _columns(cls, value: str) -> str:
        return check_columns(value)

    @model_validator(mode="after")
    def _fits_together(self) -> FinetuneData:
        if self.PRESET is not None and self.DATASET_NAME is not None:
            raise ProblemAt(
                "PRESET", f"found {self.PRESET!r} beside DATASET_NAME {self.DATASET_NAME!r}; give one of them",
                self.PRESET,
            )  # fmt: skip
        check_format(self.FORMAT_STRING, self.text_columns)
        return self

    @property
    def text_columns(self) -> list[str]:
        """Names of the text columns, trimmed."""
        return column_names(self.TEXT_COLUMN)

    @property
    def is_own(self) -> bool:
        """Whether tuning has a text of its own."""
        return bool(self.PRESET or self.DATASET_NAME or self.DATA_PATH)
