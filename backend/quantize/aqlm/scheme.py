"""Which codebooks a Linear gets, as plain data. Imports no torch: pages and preflight checks read schemes too."""

from __future__ import annotations

from dataclasses import dataclass

from backend.errors import ConfigError

MAX_CODEBOOKS = 8
MAX_NBITS = 16
STORED_BITS = 16  # of a codebook entry and of a row's scale


@dataclass(frozen=True)
class AdditiveScheme:
    """W[o, j * G + t] = scale[o] * sum over k of codebooks[k, codes[o, j, k], t].

    Source: Egiazarian et al. 2024 (AQLM, arXiv 2401.06118), with groups of one output and a scale per row, the form
    that its checkpoints can hold.

    Attributes:
        num_codebooks: K, codewords that are added.
        nbits_per_codebook: B; a codebook has 2^B words.
        in_group_size: G, weights along the input that a code stands for.

    Raises:
        ConfigError: If a value is out of range.
    """

    num_codebooks: int = 2
    nbits_per_codebook: int = 8
    in_group_size: int = 8

    def __post_init__(self) -> None:
        _check("num_codebooks", self.num_codebooks, 1, MAX_CODEBOOKS)
        _check("nbits_per_codebook", self.nbits_per_codebook, 1, MAX_NBITS)
        _check("in_group_size", self.in_group_size, 1, 64)

    @property
    def words(self) -> int:
        """Words of a codebook, 2^B."""
        return 1 << self.nbits_per_codebook

    @property
    def code_bits(self) -> int:
        """Bits in which a checkpoint stores one code: 8 or 16."""
        return 8 if self.nbits_per_codebook <= 8 else 16

    @property
    def label(self) -> str:
        """Short name, e.g. `aqlm-2x8-g8`."""
        return f"aqlm-{self.num_codebooks}x{self.nbits_per_codebook}-g{self.in_group_size}"

    def misfit(self, out: int, width: int) -> str | None:
        """Why a Linear (out, in) cannot have these codebooks; None if it can."""
        if width % self.in_group_size:
            return f"in_group_size {self.in_group_size} does not divide its {width} inputs"
        vectors = out * width // self.in_group_size
        if vectors < self.words:
            return f"it has {vectors} groups, fewer than the {self.words} words of a codebook"
        return None

    def stored_bits(self, out: int, width: int) -> int:
        """Bits of a Linear in a checkpoint: codes, codebooks and scales."""
        codes = out * (width // self.in_group_size) * self.num_codebooks * self.code_bits
        codebooks = self.num_codebooks * self.words * self.in_group_size * STORED_BITS
        return codes + codebooks + out * STORED_BITS


def _check(key: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"found {value!r}; allowed are whole numbers from {low} to {high}", key=key, value=value)
