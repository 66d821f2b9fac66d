"""What llm-compressor's recipes and schemes are and how they go together, as data.

Every pair in these tables was quantized, saved, read back and compared with the model it was made from. What does not
come back right is not in them: QuIP loses its rotations when the checkpoint is read, and GPTQ after SparseGPT fills the
zeros again (RTN keeps them).
"""

from __future__ import annotations

from dataclasses import dataclass

NO_SCHEME = "NONE"
PER_CHANNEL = -1


@dataclass(frozen=True)
class WeightScheme:
    """What a preset of llm-compressor does to the weights and activations.

    Attributes:
        about: A few words for people.
        bits: Bits per weight.
        group_size: Weights along the input that share a scale; -1: a whole row; 0: not in groups along the input.
        symmetric: True if there are no zero points.
        weight_only: True for integer weights in groups beside 16-bit activations: the group size is free, and
            Quantdeck's own core can make them too.
        needs_text: True if activations are measured on the calibration text, whatever the recipe.
    """

    about: str
    bits: int = 16
    group_size: int = 0
    symmetric: bool = True
    weight_only: bool = False
    needs_text: bool = False


SCHEMES: dict[str, WeightScheme] = {
    "W4A16": WeightScheme("4-bit weights, groups of 128", 4, 128, weight_only=True),
    "W4A16_ASYM": WeightScheme("4-bit weights with zero points", 4, 128, symmetric=False, weight_only=True),
    "W8A16": WeightScheme("8-bit weights, groups of 128", 8, 128, weight_only=True),
    "W3A16": WeightScheme("3-bit weights, groups of 128", 3, 128, weight_only=True),
    "W2A16": WeightScheme("2-bit weights, groups of 128", 2, 128, weight_only=True),
    "W8A8": WeightScheme("8-bit weights and activations", 8, PER_CHANNEL),
    "FP8_DYNAMIC": WeightScheme("8-bit floats, activations scaled per token", 8, PER_CHANNEL),
    "FP8_BLOCK": WeightScheme("8-bit floats, weights scaled in blocks of 128 x 128", 8),
    "NVFP4": WeightScheme("4-bit floats in groups of 16, activations too", 4, 16, needs_text=True),
    "NVFP4A16": WeightScheme("4-bit floats in groups of 16", 4, 16),
    "MXFP4": WeightScheme("4-bit floats in groups of 32, activations too", 4, 32),
    NO_SCHEME: WeightScheme("weights keep their 16 bits"),
}

INTEGER_WEIGHTS = tuple(name for name, scheme in SCHEMES.items() if scheme.weight_only)


@dataclass(frozen=True)
class RecipeFacts:
    """What a recipe does and what it goes with.

    Attributes:
        about: One sentence for people.
        schemes: Schemes it makes, its default first.
        uses: Settings that change its result, beside those that all recipes use.
        needs_text: True if it reads the calibration text.
    """

    about: str
    schemes: tuple[str, ...]
    uses: tuple[str, ...] = ()
    needs_text: bool = True


_GPTQ = ("DAMPENING_FRAC", "ACTORDER")
_SPARSE = ("SPARSITY", "MASK")

RECIPES: dict[str, RecipeFacts] = {
    "GPTQ": RecipeFacts("Rounds column by column and corrects the rest.", (*INTEGER_WEIGHTS, "W8A8"), _GPTQ),
    "RTN": RecipeFacts(
        "Rounds to nearest, without a text.", tuple(name for name in SCHEMES if name != NO_SCHEME), needs_text=False
    ),
    "AWQ": RecipeFacts("Scales the channels that matter most, then rounds.", INTEGER_WEIGHTS),
    "AWQ+GPTQ": RecipeFacts("AWQ's scales, then GPTQ's rounding.", INTEGER_WEIGHTS, _GPTQ),
    "SmoothQuant+GPTQ": RecipeFacts(
        "Moves outliers of the activations into the weights, then GPTQ.", ("W8A8",), ("SMOOTHING_STRENGTH", *_GPTQ)
    ),
    "SparseGPT": RecipeFacts("Sets weights to zero and corrects the rest.", (NO_SCHEME,), (*_SPARSE, "DAMPENING_FRAC")),
    "Wanda": RecipeFacts("Sets the weights to zero that matter least.", (NO_SCHEME,), _SPARSE),
    "SparseGPT+RTN": RecipeFacts(
        "SparseGPT, then rounding to nearest, which keeps the zeros.",
        ("W4A16", "W8A16", "W8A8", "FP8_DYNAMIC"),
        (*_SPARSE, "DAMPENING_FRAC"),
    ),
    "AutoRound": RecipeFacts("Learns the rounding, layer by layer.", ("W4A16",), ("AUTOROUND_ITERS",)),
    "SpinQuant+RTN": RecipeFacts(
        "Rotates the weights so that outliers spread, then rounds.", ("W4A16",), needs_text=False
    ),
    "KVCache": RecipeFacts("Only the attention's cache becomes 8-bit floats.", (NO_SCHEME,)),
}

KV_RECIPES = ("GPTQ", "RTN", "KVCache")
NATIVE_RECIPES = ("RTN", "AWQ", "GPTQ", "AWQ+GPTQ")
FREE_GROUP_RECIPES = ("GPTQ", "RTN", "AWQ", "AWQ+GPTQ")
