"""`llm.AQLM.calibration_config` and `conversion_config`: the codebooks, the search for codes, block finetuning.

Names, order and defaults are the guide's. `NO_EFFECT` keys are kept, since the guide's file has them, and say why
nothing reads them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, StrictBool, StrictFloat, StrictInt, model_validator

from backend.schema.errors import ProblemAt
from backend.schema.facts import AQLM_GUIDE, unless, when
from backend.schema.fields import drop_empty, setting

CODEBOOKS = "AQLM codebooks"
TEXT = "AQLM calibration"
BLOCKS = "AQLM block finetuning"
REFERENCE = "AQLM reference"
NO_EFFECT = "AQLM without effect"

Attention = Literal["eager", "sdpa", "flash_attention_2"]

NO_HF_FORM = "a checkpoint that transformers loads has no place for it"
OWN_CODE = (
    "The guide's true is read, but only TRUST_REMOTE_CODE at the top of the file lets code that comes with a model "
    "run, and only if the operator allows it."
)
SENDS_NOTHING = "Weights & Biases is not used: nothing is sent anywhere, the curves are on the job's page."

FITTED = unless("finetune_max_epochs", 0)

codebooks = partial(setting, section=CODEBOOKS, source=AQLM_GUIDE)
text = partial(setting, section=TEXT, source=AQLM_GUIDE)
blocks = partial(setting, section=BLOCKS, source=AQLM_GUIDE, visible_when=FITTED)
reference = partial(
    setting, section=REFERENCE, source=AQLM_GUIDE, advanced=True, visible_when=when("llm.AQLM.EFFORT", "reference")
)
no_effect = partial(setting, section=NO_EFFECT, source=AQLM_GUIDE, advanced=True, ignored=True)


class CalibrationConfig(BaseModel):
    """Codebooks, the calibration's size, block finetuning, and the reference procedure's parameters.

    Source: Egiazarian et al. 2024 (AQLM, arXiv 2401.06118) and the guide.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    # -- codebooks
    num_codebooks: StrictInt | None = codebooks(
        None, label="Codebooks", unit="per Linear", ge=1, le=8, empty="by device",
        help="Codewords that are added for each group of weights. Empty: 1 of 16 bits on a GPU, as in the guide, 2 of "
        "8 bits on a CPU.",
    )  # fmt: skip
    nbits_per_codebook: StrictInt | None = codebooks(
        None, label="Bits per codebook", unit="bits", ge=1, le=16, empty="by codebooks",
        help="A codebook has 2 to this power codewords. Empty: 16 for one codebook, 8 for several. "
        "A CPU is fast with 8, GPU kernels exist for 1 x 16, 1 x 8 and 2 x 8.",
    )  # fmt: skip
    in_group_size: StrictInt = codebooks(
        8, label="Group size", unit="weights", ge=1, le=64,
        help="Weights along the input that one code stands for: bits per weight are codebooks x bits / this. GPU "
        "kernels have 8 and 16. A Linear whose input it does not divide stays in 16 bits.",
    )  # fmt: skip
    out_group_size: StrictInt = codebooks(
        1, label="Outputs per group", unit="outputs", ge=1, le=64, advanced=True,
        help="Outputs that share a code. Only 1 can be stored in a checkpoint that other programs load.",
    )  # fmt: skip
    scale_nbits: StrictInt = codebooks(
        0, label="Bits of group scales", unit="bits", ge=0, le=16, advanced=True,
        help="0: one scale per output in 16 bits. Scales per group cannot be stored in a checkpoint that other "
        "programs load.",
    )  # fmt: skip
    codebook_value_nbits: StrictInt = codebooks(
        16, label="Bits of codebook entries", unit="bits", ge=1, le=16, advanced=True,
        help="16: codewords are stored in 16 bits. Fewer cannot be stored in a checkpoint that other programs load.",
    )  # fmt: skip
    codebook_value_num_groups: StrictInt = codebooks(
        1, label="Groups of codebook entries",
        visible_when=unless("codebook_value_nbits", 16),
        unit="groups", ge=1, le=65536, advanced=True,
        help="Only of use for codebook entries of fewer than 16 bits, which cannot be stored.",
    )  # fmt: skip
    # -- text
    nsamples: StrictInt = text(
        2048, label="Calibration sequences", unit="sequences", ge=2, le=65536,
        help="Token sequences that are read, the validation's included. CALIBRATION.SAMPLES counts more, if the "
        "file has it.",
    )  # fmt: skip
    model_seqlen: StrictInt = text(
        4096, label="Sequence length", unit="tokens", ge=16, le=131072,
        help="Tokens per sequence; rows of text are joined and cut to it. CALIBRATION.SEQUENCE_LENGTH counts more, "
        "if the file has it, and CALIBRATION.PACKING says what happens to short rows.",
    )  # fmt: skip
    val_size: StrictInt = text(
        256, label="Validation sequences", unit="sequences", ge=0, le=65535,
        help="The last sequences, on which nothing is fitted: they tell block finetuning when to stop.",
    )  # fmt: skip
    seed: StrictInt = text(
        0, label="Seed", ge=0, le=2**32 - 1, advanced=True,
        help="Fixes every random choice: the same file with the same seed gives the same checkpoint.",
    )  # fmt: skip
    dtype: Literal["auto", "float16", "float32", "bfloat16"] = text(
        "auto", label="Type of the forward passes", advanced=True,
        help="auto: the fastest sound type of the device, bfloat16 on GPUs. A CPU computes float16 in that type, too.",
    )  # fmt: skip
    true_sequential: StrictBool = text(
        False, label="One stage at a time", advanced=True,
        help="On: within a layer, inputs are taken anew after queries, keys and values, after the output, and so on. "
        "Off: once per layer.",
    )  # fmt: skip
    # -- block finetuning
    finetune_max_epochs: StrictInt = blocks(
        25, label="Epochs", visible_when=(), unit="epochs", ge=0, le=10_000,
        help="After a layer has its codes, its codebooks, scales and norms are fitted to the layer's original output "
        "for at most so many epochs. 0: never.",
    )  # fmt: skip
    finetune_lr: StrictFloat = blocks(
        0.0001, label="Learning rate", ge=1e-9, le=1.0, help="Adam's step for codebooks, scales and norms of a layer."
    )
    finetune_batch_size: StrictInt = blocks(
        256, label="Batch", unit="sequences", ge=1, le=65536,
        help="Sequences per step of Adam; a multiple of the part below.",
    )  # fmt: skip
    local_batch_size: StrictInt | None = blocks(
        None, label="Part of a batch", unit="sequences", ge=1, le=65536, empty="4096 tokens",
        help="Sequences of a batch that are computed at once; smaller takes less memory.",
    )  # fmt: skip
    finetune_early_stop: StrictInt = blocks(
        3, label="Early stop", unit="epochs", ge=1, le=10_000, advanced=True,
        help="A layer's finetuning ends after so many epochs without a better validation error; the best is kept.",
    )  # fmt: skip
    finetune_adam_beta1: StrictFloat = blocks(
        0.9, label="Adam's beta 1", ge=0.0, le=0.999999, advanced=True, help="Memory of Adam's mean gradient."
    )
    finetune_adam_beta2: StrictFloat = blocks(
        0.999, label="Adam's beta 2", ge=0.0, le=0.999999, advanced=True, help="Memory of Adam's mean squared gradient."
    )
    use_checkpointing: StrictBool = blocks(
        False, label="Recompute weights", advanced=True,
        help="On: weights are computed from codebooks again in the backward pass, which saves 4 bytes per weight of a "
        "layer and takes more time.",
    )  # fmt: skip
    # -- reference procedure
    lr: StrictFloat = reference(
        0.0001, label="Learning rate", ge=1e-9, le=1.0, help="EFFORT reference: Adam's step for codebooks and scales."
    )
    beam_size: StrictInt = reference(
        1, label="Beam", unit="paths", ge=1, le=65536, help="EFFORT reference: paths that the search for codes keeps."
    )
    max_epochs: StrictInt = reference(
        100, label="Rounds", unit="rounds", ge=1, le=100_000,
        help="EFFORT reference: rounds of Adam and search at most.",
    )  # fmt: skip
    steps_per_epoch: StrictInt = reference(
        100, label="Steps per round", unit="steps", ge=1, le=100_000, help="EFFORT reference: Adam's steps per round."
    )
    relative_mse_tolerance: StrictFloat = reference(
        0.01, label="Tolerance", ge=0.0, le=0.99,
        help="EFFORT reference: a layer is done when a round lowers its error by less than this part; 0: never before "
        "the last round.",
    )  # fmt: skip
    init_max_iter: StrictInt = reference(
        100, label="k-means iterations", unit="iterations", ge=1, le=100_000,
        help="EFFORT reference: iterations of the k-means that the codebooks start from, at most.",
    )  # fmt: skip
    init_max_points_per_centroid: StrictInt | None = reference(
        None, label="k-means points", unit="per codeword", ge=1, le=1_000_000,
        help="EFFORT reference: groups per codeword that k-means looks at. Fewer are faster.",
    )  # fmt: skip
    # -- without effect
    attn_implementation: Attention | None = no_effect(
        None, label="Attention (calibration)", help="Attention is computed by the means that suit the device."
    )
    finetune_keep_best: StrictBool = no_effect(
        True, label="Keep the best", help="The best of a layer's finetuning is always kept, as in the original."
    )
    mix_compression: StrictBool = no_effect(
        False, label="Mixed compression", help="Of use for Mixtral only; models with experts cannot be quantized yet."
    )
    new_eval: StrictBool = no_effect(
        False, label="New evaluation", help="EVALUATION says what is measured, and on which text."
    )
    no_quant: StrictBool = no_effect(
        False, label="Only evaluate",
        help="True is refused: python -m backend evaluate measures a model without quantizing it.",
    )  # fmt: skip
    offload_activations: StrictBool = no_effect(
        True, label="Offload activations", help="Activations above 2 GiB always live on disk, on every device."
    )
    on_save: str | None = no_effect(
        None, label="Code on saving",
        help="In the original a Python program that is run after every layer. Refused unless it is empty: a job file "
        "runs no code.",
    )  # fmt: skip
    print_frequency: StrictInt = no_effect(
        1, label="Print every (calibration)", unit="epochs", ge=1, le=100_000, help="The job's page tells every layer."
    )
    resume: StrictBool = no_effect(
        False, label="Resume", help="A job that was interrupted always goes on after its last finished step."
    )
    skip_out_loss: StrictBool = no_effect(
        False, label="Skip the output error", help="The output error of every layer is told; it costs nothing more."
    )
    trust_remote_code: StrictBool = no_effect(False, label="Trust code (calibration)", help=OWN_CODE)
    use_faiss: StrictBool = no_effect(
        False, label="faiss", help="k-means is our own; the original never passes this switch on either."
    )
    use_fast_tokenizer: StrictBool = no_effect(
        False,
        label="Fast tokenizer (calibration)",
        help="The model's own tokenizer is used, fast where there is one.",
    )
    wandb: StrictBool = no_effect(False, label="Weights & Biases (calibration)", help=SENDS_NOTHING)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, values: Any) -> Any:
        return drop_empty(values)

    @model_validator(mode="after")
    def _fits_together(self) -> CalibrationConfig:
        for key, only in (
            ("out_group_size", 1), ("scale_nbits", 0), ("codebook_value_nbits", 16), ("codebook_value_num_groups", 1),
        ):  # fmt: skip
            found = getattr(self, key)
            if found != only:
                raise ProblemAt(key, f"found {found}; {NO_HF_FORM}, allowed is {only}; set it to {only}", found)
        if self.on_save is not None:
            raise ProblemAt("on_save", f"found {self.on_save!r}; a job file runs no code; leave it empty", self.on_save)
        if self.no_quant:
            raise ProblemAt(
                "no_quant", "found True; to measure without quantizing use python -m backend evaluate; set it to False",
                True,
            )  # fmt: skip
        if self.mix_compression:
            raise ProblemAt(
                "mix_compression", "found True; models with experts cannot be quantized yet; set it to False", True
            )
        if self.nbits_per_codebook is not None and self.beam_size > 1 << self.nbits_per_codebook:
            raise ProblemAt(
                "beam_size",
                f"found {self.beam_size}; a codebook of {self.nbits_per_codebook} bits has "
                f"{1 << self.nbits_per_codebook} codewords; allowed are 1 to {1 << self.nbits_per_codebook}",
                self.beam_size,
            )
        if self.finetune_max_epochs and self.local_batch_size and self.finetune_batch_size % self.local_batch_size:
            raise ProblemAt(
                "local_batch_size",
                f"found {self.local_batch_size}, which does not divide finetune_batch_size "
                f"{self.finetune_batch_size}; change one of them",
                self.local_batch_size,
            )
        return self


class ConversionConfig(BaseModel):
    """How the original turned its pickles into a checkpoint. Here results are written as checkpoints at once."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    attn_implementation: Attention | None = no_effect(
        None, label="Attention (conversion)", help="Attention is computed by the means that suit the device."
    )
    code_dtype: Literal["uint8", "int8", "int16", "uint16", "int32", "int64"] = no_effect(
        "int32", label="Type of codes (conversion)",
        help="Codes are stored in 8 bits for codebooks of up to 8 bits, else in 16, as the checkpoint format says.",
    )  # fmt: skip
    load_dtype: Literal["auto", "float16", "float32", "bfloat16"] = no_effect(
        "auto", label="Type of loading (conversion)", help="Nothing is loaded: results are written as checkpoints."
    )
    trust_remote_code: StrictBool = no_effect(False, label="Trust code (conversion)", help=OWN_CODE)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, values: Any) -> Any:
        return drop_empty(values)
