"""What is compared: one entry per row of the table, and the rows of other quantizers that were measured elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from backend.quantize.recipe import METHODS, Scheme

NATIVE = "native"
PEERS = {
    "llm-compressor": "run_llm_compressor.py",
    "autoawq": "run_autoawq.py",
    "gptqmodel": "run_gptqmodel.py",
    "auto-round": "run_auto_round.py",
}
"""Other quantizers -> their programs in `benchmarks/peers`."""

ELSEWHERE = """\
Measured on 2026-11-23 with another model (12.6M-parameter Llama, 16 x 512 tokens, one thread, quantizing only, busy
machine); no row above can be compared with these, only these with each other:
  GPTQModel 7.7.0 GPTQ asymmetric      10.0 CPU s   1007 MB   KL .000139   flips 1.09 %
  GPTQModel 7.7.0 AWQ  asymmetric      83.6 CPU s   1327 MB   KL .000707   flips 2.91 %
  AutoRound 0.16.1, 50 steps, sym.     90.3 CPU s    737 MB   KL .000304   flips 1.68 %
  AutoRound 0.16.1, 200 steps, sym.   354.0 CPU s    756 MB   KL .000234   flips 1.53 %"""


@dataclass(frozen=True)
class Entry:
    """One quantizer with one setting.

    Attributes:
        quantizer: `native` or a key of `PEERS`.
        method: `RTN`, `AWQ`, `GPTQ`, `AWQ+GPTQ`, or `AutoRound`.
        bits: Bits per weight.
        group_size: Weights that share a scale.
        symmetric: Whether the middle code stands for 0.
        iterations: Steps of AutoRound.
    """

    quantizer: str
    method: str
    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    iterations: int = 0

    @property
    def name(self) -> str:
        """For folders and messages."""
        kind = "sym" if self.symmetric else "asym"
        return f"{self.quantizer}-{self.method}-w{self.bits}-g{self.group_size}-{kind}".lower()

    @property
    def scheme(self) -> Scheme:
        """The same for the native core."""
        return Scheme(self.method, self.bits, self.group_size, self.symmetric)

    def matches(self, wanted: Sequence[str]) -> bool:
        """Whether one of the names is its quantizer, or quantizer/method."""
        own = (self.quantizer.lower(), f"{self.quantizer}/{self.method}".lower())
        return any(name.lower() in own for name in wanted)


def entries(*, low_bits: bool, iterations: int) -> Iterator[list[Entry]]:
    """The rows in order, one list per process: a list of several is one run with several configurations.

    Args:
        low_bits: Whether the 3- and 2-bit rows are wanted.
        iterations: Steps of AutoRound; 0 leaves it out.
    """
    for method in METHODS:
        yield [Entry(NATIVE, method)]
    yield [Entry(NATIVE, "GPTQ", symmetric=True)]
    if low_bits:
        yield [Entry(NATIVE, method, bits) for bits in (3, 2) for method in METHODS]
    for method in ("RTN", "AWQ", "GPTQ"):
        yield [Entry("llm-compressor", method)]
    yield [Entry("llm-compressor", "GPTQ", symmetric=True)]
    yield [Entry("autoawq", "AWQ")]
    for method in ("AWQ", "GPTQ"):
        yield [Entry("gptqmodel", method)]
    if iterations:
        yield [Entry("auto-round", "AutoRound", iterations=iterations)]
