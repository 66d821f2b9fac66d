"""Settings of `llm: AQLM:`: 2-bit weights as sums of codewords, and tuning of the whole model afterwards.

Lower-case names and defaults are those of the guide's YAML. `EFFORT` and `FINETUNE_DATA` are Quantdeck's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, StrictBool, model_validator

from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.schema.aqlm_calibration import (
    BLOCKS,
    CODEBOOKS,
    NO_EFFECT,
    REFERENCE,
    TEXT,
    CalibrationConfig,
    ConversionConfig,
    no_effect,
)
from backend.schema.aqlm_finetune import CODE_BITS, TUNING, TUNING_TEXT, FinetuneConfig, FinetuneData
from backend.schema.errors import ProblemAt
from backend.schema.facts import AQLM_GUIDE, OWN, unless
from backend.schema.fields import Group, drop_empty, setting
from backend.schema.measurement import CalibrationSettings
from backend.schema.section import AlgorithmSection

KEY = "llm.AQLM"
WIDE, BYTE = 16, 8  # bits of a codebook: of the guide's only one, and of one of several


class AQLMSettings(AlgorithmSection):
    """Additive quantization, block finetuning and PV-tuning.

    Sources: Egiazarian et al. 2024 (AQLM, arXiv 2401.06118); Malinovskii et al. 2024 (PV-Tuning, arXiv 2405.14852).
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    GROUPS: ClassVar[tuple[Group, ...]] = (
        Group("AQLM"),
        Group(CODEBOOKS, "Codebooks", "Bits per weight are codebooks x bits / group size, plus the codebooks' own."),
        Group(
            TEXT,
            "Calibration text: how much",
            "The keys of AQLM's own section; the same keys of CALIBRATION above count more, if the file has them.",
        ),
        Group(
            BLOCKS,
            "Block finetuning",
            "After a layer has its codes, its codebooks, scales and norms are fitted to its original output.",
        ),
        Group(
            TUNING,
            "Tuning of the whole model",
            "The quantized model learns to answer like the original (PV-tuning); makes a second result.",
        ),
        Group(TUNING_TEXT, "Tuning text", "Left empty, tuning reads the calibration text again."),
        Group(REFERENCE, "Reference procedure", "Only for EFFORT reference, the search as its authors published it."),
        Group(
            NO_EFFECT,
            "Kept for the guide's file",
            "The guide has these keys. Nothing here depends on them; each says why.",
            ignored=True,
        ),
    )

    EFFORT: Literal["fast", "default", "thorough", "reference"] = setting(
        "default", label="Effort", section="AQLM", source=OWN,
        help="How hard codes are searched. fast, default and thorough are our own search by error feedback; reference "
        "is the published procedure with the guide's parameters (beam_size, max_epochs, ...), many times slower.",
    )  # fmt: skip
    dtype: Literal["float16", "bfloat16"] = setting(
        "float16", label="16-bit type", section="AQLM", source=AQLM_GUIDE,
        advanced=True, help="Type in which everything is stored that has no codes. GPU kernels expect float16.",
    )  # fmt: skip
    save_intermediate_results: StrictBool = setting(
        False, label="Keep the tuning text", section="AQLM", source=AQLM_GUIDE, advanced=True,
        visible_when=unless("finetune_config.max_epochs", 0),
        help="On: the tokens of the tuning text are published beside the models, in tmp/tokenized_dataset. The "
        "calibrated model is always kept, in tmp/caliberation, also beside the tuned one in tmp/converted.",
    )  # fmt: skip
    overwrite: StrictBool = no_effect(
        False, label="Overwrite", help="A job never writes into another's folder; the original drops this value, too."
    )
    calibration_config: CalibrationConfig = Field(default_factory=CalibrationConfig)
    conversion_config: ConversionConfig = Field(default_factory=ConversionConfig)
    finetune_config: FinetuneConfig = Field(default_factory=FinetuneConfig)
    FINETUNE_DATA: FinetuneData = Field(default_factory=FinetuneData)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, values: Any) -> Any:
        return drop_empty(values)

    @model_validator(mode="after")
    def _fits_together(self) -> AQLMSettings:
        tune, bits = self.finetune_config, self.calibration_config.nbits_per_codebook
        if tune.tunes and bits is not None:
            if tune.beam_size > 1 << bits:
                raise ProblemAt(
                    "finetune_config.beam_size",
                    f"found {tune.beam_size}; a codebook of {bits} bits has {1 << bits} codewords; allowed are 1 to "
                    f"{1 << bits}",
                    tune.beam_size,
                )
            if CODE_BITS[tune.code_dtype] < bits:
                fitting = ", ".join(name for name, size in CODE_BITS.items() if size >= bits)
                raise ProblemAt(
                    "finetune_config.code_dtype",
                    f"found {tune.code_dtype!r}, which does not hold codes of {bits} bits; allowed are {fitting}",
                    tune.code_dtype,
                )
        return self

    @property
    def tunes(self) -> bool:
        """Whether the job makes a tuned model beside the calibrated one."""
        return self.finetune_config.tunes

    @property
    def calibration_size(self) -> Mapping[str, Any]:
        """How much calibration text the section asks for."""
        config = self.calibration_config
        return {"SAMPLES": config.nsamples, "SEQUENCE_LENGTH": config.model_seqlen, "SEED": config.seed}

    def scheme(self, device: str) -> AdditiveScheme:
        """The codebooks, with what the file leaves open decided by the device.

        Args:
            device: `cpu`, or the name of a GPU.
        """
        config = self.calibration_config
        count, bits = config.num_codebooks, config.nbits_per_codebook
        if count is None and bits is None:
            count = 2 if device == "cpu" else 1
        count = count or (2 if bits is not None and bits <= BYTE else 1)
        bits = bits or (WIDE if count == 1 else BYTE)
        return AdditiveScheme(count, bits, config.in_group_size)

    def check_job(self, calibration: CalibrationSettings, n_gpus: int) -> None:
        """Refuse a validation that leaves nothing to fit on, and a batch that its GPUs cannot share evenly."""
        blocks, tune = self.calibration_config, self.finetune_config
        if blocks.val_size >= calibration.SAMPLES:
            raise ProblemAt(
                f"{KEY}.calibration_config.val_size",
                f"found {blocks.val_size}, and {calibration.SAMPLES} sequences are read in all (nsamples, or "
                f"CALIBRATION.SAMPLES); allowed are 0 to {calibration.SAMPLES - 1}",
                blocks.val_size,
            )
        if tune.tunes and n_gpus > 1 and tune.master_dtype != "float32":
            raise ProblemAt(
                f"{KEY}.finetune_config.master_dtype",
                f"found {tune.master_dtype!r} beside {n_gpus} GPUs in CUDA_ID, which share weights in float32; set it "
                "to float32, or name one GPU",
                tune.master_dtype,
            )
        micro = tune.microbatch_size or 1
        part = micro * n_gpus
        if tune.tunes and tune.batch_size % part:
            raise ProblemAt(
                f"{KEY}.finetune_config.batch_size",
                f"found {tune.batch_size}; it has to be a multiple of {part}: microbatch_size {micro} on each of the "
                f"{n_gpus} GPUs of CUDA_ID; use {_near(tune.batch_size, part)}",
                tune.batch_size,
            )


def _near(wanted: int, part: int) -> int:
    """The multiple of `part` next to a number, at least one."""
    return max(1, round(wanted / part)) * part
