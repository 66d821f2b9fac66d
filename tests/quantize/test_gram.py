from __future__ import annotations

import pytest
import torch

from backend.quantize.gram import BLOCK, Gram, energy_change, error_energy

CPU = torch.device("cpu")


def gram_of(x: torch.Tensor, parts: int) -> Gram:
    gram = Gram(x.shape[-1], CPU)
    for part in x.split(-(-len(x) // parts)):
        gram.add(part)
    return gram


@pytest.mark.parametrize("width", [32, 200, BLOCK, BLOCK + 1, 2 * BLOCK + 40])
@pytest.mark.parametrize("parts", [1, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gram_matches_float64(width: int, parts: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(16, 40, width) * torch.logspace(-2, 1, width)).to(dtype)
    gram = gram_of(x, parts)
    flat = x.double().view(-1, width)
    reference = flat.T @ flat
    assert gram.tokens == 640
    H = gram.H  # noqa: N806
    assert H.dtype == torch.float32
    assert torch.equal(H, H.T)
    norms = flat.norm(dim=0)
    # float32 sums, relative to the norms of the two columns; a bfloat16 part's product is rounded once more, to 8
    # bits, and is bounded by the norms too
    bound = 2.0**-8 if dtype == torch.bfloat16 else 2e-6
    assert ((H.double() - reference).abs() <= bound * norms[:, None] * norms).all()
    bound = 2.0**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(gram.mean_abs.double(), flat.abs().mean(0), rtol=bound, atol=0)


def test_roundings_of_parts_average_out() -> None:
    """As the module says: over n parts the sum is off by about 2^-9 / sqrt(n) of an entry."""
    torch.manual_seed(0)
    x = (torch.randn(64 * 16, 128) @ (torch.eye(128) + 0.3)).bfloat16()  # correlated: no entry is near 0
    reference = x.double().T @ x.double()

    def error(parts: int) -> float:
        return float(((gram_of(x, parts).H.double() - reference) / reference).square().mean().sqrt())

    assert error(16) <= 1.5 * 2.0**-9 / 16**0.5
    assert error(1) <= 2.0**-9


def test_parts_of_any_shape() -> None:
    x = torch.randn(4, 3, 32)
    whole, flat, empty = Gram(32, CPU), Gram(32, CPU), Gram(32, CPU)
    whole.add(x)
    for row in x.reshape(-1, 32).split(5):
        flat.add(row)
    assert whole.tokens == flat.tokens == 12
    torch.testing.assert_close(whole.H, flat.H, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.mean_abs, flat.mean_abs)
    empty.add(x[:0])
    assert empty.tokens == 0
    assert empty.H.abs().max() == empty.mean_abs.abs().max() == 0


def test_asking_twice_changes_nothing() -> None:
    gram = gram_of(torch.randn(20, 300), 2)
    first = gram.H.clone()
    assert torch.equal(gram.H, first)


def test_energy_is_that_of_the_real_output_error() -> None:
    torch.manual_seed(0)
    x, e = torch.randn(100, 48, dtype=torch.float64), torch.randn(7, 48, dtype=torch.float64)
    torch.testing.assert_close(error_energy(e, x.T @ x), (x @ e.T).square().sum(0), rtol=1e-10, atol=0)
    blocks = torch.stack([x[:, :24].T @ x[:, :24], x[:, 24:].T @ x[:, 24:]])
    parts = e.view(7, 2, 24).transpose(0, 1)
    expected = torch.stack([(x[:, a : a + 24] @ e[:, a : a + 24].T).square().sum(0) for a in (0, 24)])
    torch.testing.assert_close(error_energy(parts, blocks), expected, rtol=1e-10, atol=0)


def test_energy_with_a_bfloat16_H() -> None:  # noqa: N802
    torch.manual_seed(0)
    x = (torch.randn(400, 256) @ (torch.eye(256) + 0.05 * torch.randn(256, 256))).double()
    e = torch.rand(50, 256, dtype=torch.float64) - 0.5
    H = x.T @ x  # noqa: N806
    found = error_energy(e.float(), H.bfloat16())
    assert found.dtype == torch.float32
    exact = error_energy(e, H)
    assert ((found.double() - exact).abs() <= 2.0**-8 * exact).all()


def test_energy_change_matches_float64_where_the_difference_is_small() -> None:
    torch.manual_seed(0)
    x = torch.randn(640, 128).double()
    H = x.T @ x  # noqa: N806
    before = torch.randn(50, 128)
    after = before + 1e-3 * torch.randn(50, 128)
    reference = error_energy(after.double(), H) - error_energy(before.double(), H)
    scale = reference.abs().mean()
    assert ((energy_change(before, after, H.float()).double() - reference).abs() <= 1e-4 * scale).all()
    fast = energy_change(before, after, H.bfloat16()).double()
    assert ((fast - reference).abs().mean() <= 0.02 * scale).all()  # each of the two terms of d H (a + b) is rounded
