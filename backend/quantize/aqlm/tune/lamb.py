"""Adam and LAMB for tensors that may be spread over processes.

`torch.optim.Adam` has no trust ratio, always corrects the start, keeps a first moment even where beta1 is 0 (4 bytes
per weight of the model here) and has its state in the parameter's type; PV-tuning needs all four otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor


class Lamb:
    """LAMB (You et al. 2019, arXiv 1904.00962) without weight decay, or Adam (Kingma & Ba 2014, arXiv 1412.6980).

    With m, v the decayed means of g and g²: u = m / (sqrt(v) + eps); the parameter moves by -lr u, with LAMB by
    -lr u |p| / |u|, so that lr is the relative change of a tensor per step.

    Args:
        parameters: By name; changed in place. Their type is float32, or that of a buffer.
        lr: Step.
        beta1: Decay of m; 0: m is g, and nothing is kept.
        beta2: Decay of v.
        lamb: Scale by the norms.
        debias: Divide m and v by 1 - beta^t; None: only without `lamb`.
        amsgrad: Use the largest v so far (Reddi et al. 2018, arXiv 1904.09237).
        state_dtype: Type of m and v; None: the parameter's.
        spread: Names of the tensors of which each process has some rows.
        sum_over_processes: Sums a vector over processes in place; needed for `spread`.
        eps: Keeps the divisor from 0. Gradients per weight of a mean over tokens are often below Adam's usual 1e-8.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        *,
        lr: float,
        beta1: float,
        beta2: float,
        lamb: bool,
        debias: bool | None = None,
        amsgrad: bool = False,
        state_dtype: torch.dtype | None = None,
        spread: Collection[str] = (),
        sum_over_processes: Callable[[Tensor], Tensor] = lambda values: values,
        eps: float = 1e-12,
    ) -> None:
        self._parameters = dict(parameters)
        self._lr, self._beta1, self._beta2, self._eps = lr, beta1, beta2, eps
        self._lamb, self._debias = lamb, not lamb if debias is None else debias
        self._spread, self._sum = frozenset(spread), sum_over_processes
        self.state: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            kinds = ("m",) * (beta1 > 0) + ("v",) + ("v_max",) * amsgrad
            for kind in kinds:
                self.state[f"{name}.{kind}"] = torch.zeros_like(parameter, dtype=state_dtype or parameter.dtype)

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], number: int, factor: float = 1.0) -> None:
        """Move the parameters that have a gradient.

        Args:
            grads: By name.
            number: Of this step for these parameters, counted from 1.
            factor: Of the learning rate.
        """
        if not grads:
            return
        updates = {name: self._update(name, grad.to(torch.float32), number) for name, grad in grads.items()}
        ratios = self._trust_ratios(updates) if self._lamb else dict.fromkeys(updates, 1.0)
        for name, update in updates.items():
            parameter = self._parameters[name]
            moved = parameter.to(torch.float32).sub(update, alpha=self._lr * factor * ratios[name])
            parameter.copy_(moved)

    def _update(self, name: str, grad: Tensor, number: int) -> Tensor:
        m = grad if self._beta1 == 0 else self._decayed(f"{name}.m", grad, self._beta1)
        v = self._decayed(f"{name}.v", grad.square(), self._beta2)
        kept = self.state.get(f"{name}.v_max")
        if kept is not None:
            v = torch.maximum(kept.to(torch.float32), v)
            kept.copy_(v)
        if not self._debias:
            return m / v.sqrt().add_(self._eps)
        divisor = (v / (1 - self._beta2**number)).sqrt_().add_(self._eps)
        return (m / (1 - self._beta1**number)).div_(divisor)

    def _decayed(self, key: str, value: Tensor, beta: float) -> Tensor:
        """Update the mean that is kept, beta of it and the rest of the value; float32."""
        kept = self.state[key]
        new = kept.to(torch.float32).lerp(value, 1 - beta)
        kept.copy_(new)
        return new

    def _trust_ratios(self, updates: Mapping[str, Tensor]) -> dict[str, float]:
        """|p| / |u| of each tensor; 1 where one of them is 0, as in the paper."""
        squares = torch.stack(
            [
                torch.stack([t.to(torch.float32).square().sum(dtype=torch.float64) for t in (self._parameters[n], u)])
                for n, u in updates.items()
            ]
        )
        parts = torch.tensor([name in self._spread for name in updates], device=squares.device)
        if bool(parts.any()):
            squares = torch.where(parts[:, None], self._sum(squares * parts[:, None]), squares)
        ratios = {}
        for name, (of_parameter, of_update) in zip(updates, squares.tolist(), strict=True):
            ratios[name] = (of_parameter / of_update) ** 0.5 if of_parameter > 0 and of_update > 0 else 1.0
        return ratios
