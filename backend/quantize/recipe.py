"""What to do with which Linear, as plain data: one `Scheme` per Linear, one `Recipe` per configuration.

Imports no torch: pages and preflight checks read recipes too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from backend.errors import ConfigError

METHODS = ("RTN", "AWQ", "GPTQ", "AWQ+GPTQ")
BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)
PER_CHANNEL = -1
MISFITS = ("keep", "fit")


@dataclass(frozen=True)
class Scheme:
    """How one Linear is quantized.

    Attributes:
        method: `RTN` (rounding to nearest), `AWQ` (scaled channels, searched ranges), `GPTQ` (error feedback) or
            `AWQ+GPTQ` (scaled channels, then error feedback on corrected targets, then refinement).
        bits: Bits per weight.
        group_size: Weights along the input that share a step and a zero; -1: all of a row.
        symmetric: True: the middle code stands for 0. False: every group has a zero of its own.

    Raises:
        ConfigError: If a value is not among the allowed ones.
    """

    method: str = "GPTQ"
    bits: int = 4
    group_size: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        _check("method", self.method, METHODS)
        _check("bits", self.bits, BITS)
        _check("group_size", self.group_size, (*GROUP_SIZES, PER_CHANNEL))

    @property
    def scales_channels(self) -> bool:
        """Whether AWQ's scales are searched for it."""
        return self.method.startswith("AWQ")

    @property
    def feeds_back(self) -> bool:
        """Whether GPTQ rounds it."""
        return self.method.endswith("GPTQ")

    @property
    def combines(self) -> bool:
        """Whether it takes whatever lowers the error: a recipe's `correct` and `refine` are for it."""
        return self.scales_channels and self.feeds_back

    @property
    def label(self) -> str:
        """Short name, e.g. `awq-gptq-w3-g64-sym` or `rtn-w8-channel`."""
        groups = "channel" if self.group_size == PER_CHANNEL else f"g{self.group_size}"
        name = f"{self.method.lower().replace('+', '-')}-w{self.bits}-{groups}"
        return f"{name}-sym" if self.symmetric else name


@dataclass(frozen=True)
class Override:
    """An exception to a recipe's scheme.

    Attributes:
        pattern: Shell-style pattern over full Linear names, e.g. `model.layers.0.*` or `*.down_proj`.
        scheme: What to do instead; None keeps them in 16 bits.
    """

    pattern: str
    scheme: Scheme | None


@dataclass(frozen=True)
class Recipe:
    """One configuration: what happens to every Linear of the model's decoder layers.

    Attributes:
        name: Names the result's folder and rows.
        scheme: What happens unless an override says otherwise.
        overrides: The first one whose pattern matches decides.
        keep: Linears whose name contains one of these stay in 16 bits.
        misfit: For a Linear whose input the group size does not divide: `keep` leaves it in 16 bits, `fit` takes
            the largest group size that divides it.
        scale_grid: Ratios tried in AWQ's scale search; 0 switches it off.
        clip: Search for ranges smaller than the weights' own.
        act_order: GPTQ takes the inputs in the order of their energy.
        damp: GPTQ adds this part of the mean diagonal to H; raised where H is singular.
        correct: AWQ+GPTQ: Linears make up for the errors of those before them in the layer.
        refine: AWQ+GPTQ: times that steps and codes are improved in turn after the feedback; 0 switches it off.

    Raises:
        ConfigError: If a value is out of range.
    """

    name: str
    scheme: Scheme = field(default_factory=Scheme)
    overrides: tuple[Override, ...] = ()
    keep: tuple[str, ...] = ("lm_head",)
    misfit: str = "keep"
    scale_grid: int = 20
    clip: bool = True
    act_order: bool = True
    damp: float = 0.01
    correct: bool = True
    refine: int = 2

    def __post_init__(self) -> None:
        _check("misfit", self.misfit, MISFITS)
        if self.scale_grid < 0:
            raise ConfigError(f"found {self.scale_grid}; 0 or more", key="scale_grid", value=self.scale_grid)
        if self.refine < 0:
            raise ConfigError(f"found {self.refine}; 0 or more", key="refine", value=self.refine)
        if not 0 < self.damp <= 1:
            raise ConfigError(f"found {self.damp}; above 0 and at most 1", key="damp", value=self.damp)

    @property
    def corrects(self) -> bool:
        """Whether some Linears may be corrected."""
        schemes = [self.scheme, *(override.scheme for override in self.overrides)]
        return self.correct and any(scheme is not None and scheme.combines for scheme in schemes)

    def scheme_for(self, name: str, width: int) -> Scheme | str:
        """What happens to a Linear.

        Args:
            name: Its full name, e.g. `model.layers.3.mlp.down_proj`.
            width: Its inputs.

        Returns:
            The scheme, or the reason why it stays in 16 bits.
        """
        part = next((p for p in self.keep if p in name), None)
        if part is not None:
            return f"its name contains {part!r}, which is to be kept"
        override = next((o for o in self.overrides if fnmatchcase(name, o.pattern)), None)
        scheme = override.scheme if override else self.scheme
        if scheme is None:
            assert override is not None
            return f"it matches {override.pattern!r}, which is to be kept"
        if scheme.group_size == PER_CHANNEL or width % scheme.group_size == 0:
            return scheme
        fitting = [g for g in GROUP_SIZES if g < scheme.group_size and width % g == 0]
        if self.misfit == "fit" and fitting:
            return replace(scheme, group_size=max(fitting))
        return f"group size {scheme.group_size} does not divide its {width} inputs"

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`."""
        overrides = (
            Override(o["pattern"], None if o["scheme"] is None else Scheme(**o["scheme"]))
            for o in values.get("overrides", ())
        )
        plain: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        plain["scheme"] = Scheme(**values.get("scheme", {}))
        return cls(**(plain | {"overrides": tuple(overrides)}))


def _check(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed or isinstance(value, bool):
        raise ConfigError(f"found {value!r}; allowed are {', '.join(map(str, allowed))}", key=key, value=value)
