"""Steps of Adam and LAMB against their definitions in float64, and against torch's own Adam."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from backend.quantize.aqlm.tune.lamb import Lamb

SHAPES = {"a": (5, 7), "b": (3,), "c": (4, 2, 3)}


def random(scale: float, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def by_definition(
    start: Tensor, grads: list[Tensor], lr: float, beta1: float, beta2: float, lamb: bool, debias: bool, amsgrad: bool
) -> Tensor:
    """Algorithm 2 of arXiv 1904.00962 without weight decay, or Adam."""
    p, m, v = start.double(), torch.zeros_like(start).double(), torch.zeros_like(start).double()
    largest = v.clone()
    for t, g in enumerate((grad.double() for grad in grads), start=1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        largest = torch.maximum(largest, v)
        used = largest if amsgrad else v
        m_hat, v_hat = (m / (1 - beta1**t), used / (1 - beta2**t)) if debias else (m, used)
        update = m_hat / (v_hat.sqrt() + 1e-12)
        ratio = (p.norm() / update.norm()) if lamb and p.norm() > 0 and update.norm() > 0 else 1.0
        p = p - lr * ratio * update
    return p


@pytest.mark.parametrize(("lamb", "debias", "amsgrad", "beta1"), product([0, 1], [0, 1], [0, 1], [0.0, 0.9]))
def test_against_the_definition(lamb: bool, debias: bool, amsgrad: bool, beta1: float) -> None:
    parameters = random(1.0, 0)
    start = {name: p.clone() for name, p in parameters.items()}
    options: dict[str, Any] = dict(lr=0.03, beta1=beta1, beta2=0.95, lamb=bool(lamb), debias=bool(debias))
    optimizer = Lamb(parameters, **options, amsgrad=bool(amsgrad))
    steps = [random(1e-6 * 3.0**k, k + 1) for k in range(6)]
    for number, grads in enumerate(steps, start=1):
        optimizer.step(grads, number)
    for name, parameter in parameters.items():
        expected = by_definition(start[name], [g[name] for g in steps], amsgrad=bool(amsgrad), **options)
        assert (parameter - expected).norm() / (expected - start[name].double()).norm() < 2e-6
    assert not any(key.endswith(".m") for key in optimizer.state) or beta1 > 0  # nothing is kept for beta1 = 0


def test_against_torch_adam() -> None:
    parameters = random(1.0, 0)
    theirs = [torch.nn.Parameter(p.clone()) for p in parameters.values()]
    adam = torch.optim.Adam(theirs, lr=0.01, betas=(0.8, 0.9), eps=1e-12)
    optimizer = Lamb(parameters, lr=0.01, beta1=0.8, beta2=0.9, lamb=False)
    for number in range(1, 6):
        grads = random(0.1, number)
        for parameter, grad in zip(theirs, grads.values(), strict=True):
            parameter.grad = grad.clone()
        adam.step()
        optimizer.step(grads, number)
    for mine, other in zip(parameters.values(), theirs, strict=True):
        torch.testing.assert_close(mine, other.detach(), rtol=2e-6, atol=2e-7)


def test_lamb_moves_by_the_rate_relative_to_the_norm() -> None:
    parameters = random(7.0, 0)
    before = {name: p.clone() for name, p in parameters.items()}
    optimizer = Lamb(parameters, lr=0.25, beta1=0.0, beta2=0.95, lamb=True)
    optimizer.step(random(1e-9, 1), 1, factor=0.5)
    for name, parameter in parameters.items():
        assert float((parameter - before[name]).norm() / before[name].norm()) == pytest.approx(0.125, rel=1e-5)


def test_zeros_take_a_plain_step() -> None:
    parameters = {"zero": torch.zeros(4), "still": torch.ones(4)}
    optimizer = Lamb(parameters, lr=0.1, beta1=0.0, beta2=0.5, lamb=True, debias=True)
    optimizer.step({"zero": torch.full((4,), 3.0), "still": torch.zeros(4)}, 1)
    torch.testing.assert_close(parameters["zero"], torch.full((4,), -0.1))
    assert torch.equal(parameters["still"], torch.ones(4))


def test_only_what_has_a_gradient_moves() -> None:
    parameters = random(1.0, 0)
    before = parameters["b"].clone()
    Lamb(parameters, lr=0.1, beta1=0.9, beta2=0.9, lamb=True).step({"a": torch.ones(5, 7)}, 1)
    assert torch.equal(parameters["b"], before)


@pytest.mark.parametrize("lamb", [False, True])
def test_16_bit_means_are_near(lamb: bool) -> None:
    exact, rough = random(1.0, 0), random(1.0, 0)
    start = random(1.0, 0)
    options: dict[str, Any] = dict(lr=0.02, beta1=0.5, beta2=0.95, lamb=lamb)
    a, b = Lamb(exact, **options), Lamb(rough, **options, state_dtype=torch.bfloat16)
    for number in range(1, 6):
        grads = random(1e-7, number)
        a.step(grads, number)
        b.step(grads, number)
    assert {t.dtype for t in b.state.values()} == {torch.bfloat16}
    for name, parameter in exact.items():
        assert 0 < (parameter - rough[name]).norm() < 0.01 * (parameter - start[name]).norm()


def test_rows_in_two_processes_move_as_in_one() -> None:
    """Both halves of `a` step with the norm of the whole; `b` is in both, and is not summed."""
    whole = {name: t for name, t in random(1.0, 0).items() if name != "c"}
    halves = [{"a": whole["a"][rows].clone(), "b": whole["b"].clone()} for rows in (slice(0, 3), slice(3, 5))]
    grads = random(0.1, 5)
    Lamb(whole, lr=0.1, beta1=0.0, beta2=0.95, lamb=True).step({n: grads[n] for n in whole}, 1)
    told: list[Tensor] = []
    for turn in (0, 1):  # first only to learn what each process would tell the other
        for number, rows in enumerate((slice(0, 3), slice(3, 5))):
            mine = {n: t.clone() for n, t in halves[number].items()}

            def sum_up(values: Tensor, other: int = 1 - number, turn: int = turn) -> Tensor:
                told.append(values.clone())
                return values + told[other] if turn else values

            optimizer = Lamb(
                mine, lr=0.1, beta1=0.0, beta2=0.95, lamb=True, spread={"a"}, sum_over_processes=sum_up
            )  # fmt: skip
            optimizer.step({"a": grads["a"][rows], "b": grads["b"]}, 1)
            if turn:
                torch.testing.assert_close(mine["a"], whole["a"][rows], rtol=1e-6, atol=1e-7)
                torch.testing.assert_close(mine["b"], whole["b"], rtol=1e-6, atol=1e-7)
