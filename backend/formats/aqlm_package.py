"""The aqlm package's kernels, used where they run and give the right numbers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from backend.formats import aqlm
from backend.formats.additive_weight import AdditiveWeight

TRIAL_SHAPE = (256, 512)
TRIAL_ROWS = (1, 16)  # the package has one kernel for few rows of x and another for many
TOLERANCE = 0.02
"""Of the norm of y: 16-bit sums in any order stay below, a wrong code does not."""


class PackageLinear(nn.Module):
    """A `QuantizedLinear` of the aqlm package, which remembers what it is.

    Args:
        weight: Codes, codebooks and scales.
        bias: (out,) or None.
        dtype: Type of codebooks, scales, x and y.
        device: Where the module lives.
        label: Name of the scheme.
    """

    def __init__(
        self,
        weight: AdditiveWeight,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        label: str = "AQLM",
    ) -> None:
        from aqlm import QuantizedLinear

        super().__init__()
        K, _, G = weight.codebooks.shape  # noqa: N806
        out, width = weight.shape
        nbits = weight.nbits_per_codebook
        self.out_features, self.in_features = out, width
        self.decode_path = f"{label}: kernels of the aqlm package"
        self.inner: Any = QuantizedLinear(width, out, G, 1, K, nbits, bias=bias is not None, device="meta", dtype=dtype)
        tensors = aqlm.pack(weight)
        tensors["codebooks"] = weight.codebooks.unsqueeze(2)
        tensors["scales"] = weight.scales.view(-1, 1, 1, 1)
        if bias is not None:
            tensors["bias"] = bias
        for name, tensor in tensors.items():
            target = tensor.to(device, tensor.dtype if name == "codes" else dtype).contiguous()
            setattr(self.inner, name, nn.Parameter(target, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y: Tensor = self.inner(x)
        return y


@cache
def package_problem(scheme: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> str:
    """Why the package cannot run a scheme here; empty if a trial gave the right numbers.

    Args:
        scheme: Codebooks, bits of each, inputs per code.
        dtype: Type of x and y.
        device: Where.
    """
    K, nbits, G = scheme  # noqa: N806
    generator = torch.Generator().manual_seed(0)
    out, width = TRIAL_SHAPE[0], TRIAL_SHAPE[1] // G * G
    weight = AdditiveWeight(
        torch.randint(0, 1 << nbits, (out, width // G, K), generator=generator, dtype=torch.int32),
        torch.randn(K, 1 << nbits, G, generator=generator).to(dtype),
        torch.rand(out, generator=generator).to(dtype),
    )
    bias = torch.randn(out, generator=generator)
    try:
        linear = PackageLinear(weight, bias, dtype=dtype, device=device)
        for rows in TRIAL_ROWS:
            x = torch.randn(rows, width, generator=generator)
            with torch.no_grad():
                found = linear(x.to(device, dtype)).float().cpu()
            expected = x.to(dtype).float() @ weight.dequantize().T + bias
            if not bool((found - expected).norm() <= TOLERANCE * expected.norm()):
                return "the aqlm package's kernel gave wrong numbers in a trial"
    except Exception as error:  # whatever compilers, drivers and the package's assertions raise: there is another way
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"the aqlm package's kernels do not run: {reason[:200]}"
    return ""
