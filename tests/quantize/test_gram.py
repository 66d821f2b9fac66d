from __future__ import annotations

import pytest
import torch

from backend.quantize.gram import Gram, error_energy

CPU = torch.device("cpu")


@pytest.mark.parametrize("width", [32, 64, 200, 384])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gram_matches_float64(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(5, 40, width) * torch.logspace(-2, 1, width)).to(dtype)
    gram = Gram(width, CPU)
    for part in x.split(2):
        gram.add(part)
    flat = x.double().view(-1, width)
    reference = flat.T @ flat
    assert gram.tokens == 200
    # float32 sums of 200 products: relative to the norms of the two columns
    norms = flat.norm(dim=0)
    assert ((gram.H.double() - reference).abs() <= 2e-6 * norms[:, None] * norms).all()
    assert torch.equal(gram.H, gram.H.T)
    torch.testing.assert_close(gram.mean_abs.double(), flat.abs().mean(0), rtol=1e-5, atol=0)


def test_energy_is_that_of_the_real_output_error() -> None:
    torch.manual_seed(0)
    x, e = torch.randn(100, 48, dtype=torch.float64), torch.randn(7, 48, dtype=torch.float64)
    torch.testing.assert_close(error_energy(e, x.T @ x), (x @ e.T).square().sum(0), rtol=1e-10, atol=0)
