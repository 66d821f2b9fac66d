"""The layers that `benchmarks.aqlm` quantizes: weights, Gram matrices to fit on, and held-out ones to judge by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from backend.demo import MODEL_DIR
from backend.quantize.calibrate import calibrate
from backend.quantize.check import checked_architecture
from backend.quantize.groups import weight_of
from backend.quantize.stream import LayerStream, assign
from backend.quantize.weights import WeightFiles
from benchmarks.inputs import demo_held_out, demo_tokens

STRONG, MILD = 1.5, 0.75
"""Decay of the synthetic inputs' spectrum: eigenvalue n of their covariance is n^-decay."""
OUTLIERS, OUTLIER_SCALE = 0.02, 8.0  # part of the inputs that are larger, and by how much
TOKENS = 4096  # of which a quarter is held out
DEMO_SAMPLES, DEMO_HELD_OUT, DEMO_LENGTH = 64, 32, 512
DEMO_LINEARS = {
    0: ("self_attn.q_proj", "mlp.down_proj"),
    1: ("self_attn.v_proj", "mlp.gate_proj"),
    2: ("self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"),
}


@dataclass(frozen=True)
class Layer:
    """One Linear.

    Attributes:
        name: For the table.
        W: (out, in), float32.
        H: Gram matrix of the calibration inputs, (in, in).
        held_out: Of inputs that the fit does not see.
    """

    name: str
    W: Tensor
    H: Tensor
    held_out: Tensor


def synthetic(out: int, width: int, decay: float, seed: int = 0) -> Layer:
    """Normal weights; inputs with a power-law spectrum in random directions, some of them with outlier channels."""
    generator = torch.Generator().manual_seed(seed)
    inputs = _inputs(width, decay, generator)
    W = torch.randn(out, width, generator=generator) * 0.02  # noqa: N806
    return Layer(f"{'strong' if decay == STRONG else 'mild'} {out}x{width}", W, *_grams(inputs))


def llama_shaped(hidden: int, intermediate: int, keys: int, decay: float, seed: int = 0) -> Iterator[Layer]:
    """The seven Linears of one decoder layer, synthetic; those with one input share it.

    Args:
        hidden: Width of the hidden states.
        intermediate: Width of the MLP.
        keys: Outputs of k and of v.
        decay: Of the inputs' spectra.
        seed: Of all draws.
    """
    sites = {
        hidden: (("q", hidden), ("k", keys), ("v", keys)),
        -hidden: (("o", hidden),),
        hidden + 0.5: (("gate", intermediate), ("up", intermediate)),
        intermediate: (("down", hidden),),
    }
    generator = torch.Generator().manual_seed(seed)
    for site, linears in sites.items():
        width = abs(int(site))
        H, held_out = _grams(_inputs(width, decay, generator))  # noqa: N806
        for name, out in linears:
            W = torch.randn(out, width, generator=generator) * 0.02  # noqa: N806
            yield Layer(f"{name} {out}x{width}", W, H, held_out)


@torch.no_grad()
def demo() -> Iterator[Layer]:
    """Linears of the demo model on its own text: calibration from the training rows, held out from the test rows."""
    architecture, weights = checked_architecture(MODEL_DIR, torch.float32), WeightFiles(MODEL_DIR)
    texts = demo_tokens(DEMO_SAMPLES, DEMO_LENGTH), demo_held_out(DEMO_HELD_OUT)[:, :DEMO_LENGTH]
    streams = [LayerStream(architecture, weights, text, None, torch.device("cpu"), torch.float32) for text in texts]
    for index, wanted in DEMO_LINEARS.items():
        grams: list[dict[str, Tensor]] = []
        for stream in streams:
            with stream.layer(index) as layer:
                found = calibrate(stream, index, layer)
                grams.append({name: gram.H for group, gram in found.items() for name in group.linears})
        with streams[0].layer(index) as layer:
            assign(layer, streams[0].read(index, [f"{name}.weight" for name in wanted], torch.float32))
            for name in wanted:
                W = weight_of(layer, name).clone()  # noqa: N806
                title = f"demo {index}.{name.split('.')[1].removesuffix('_proj')} {W.shape[0]}x{W.shape[1]}"
                yield Layer(title, W, grams[0][name], grams[1][name])


def _inputs(width: int, decay: float, generator: torch.Generator) -> Tensor:
    """(TOKENS, width)."""
    spectrum = torch.arange(1, width + 1).pow(-decay / 2)
    directions, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    channels = torch.ones(width)
    channels[torch.randperm(width, generator=generator)[: round(OUTLIERS * width)]] = OUTLIER_SCALE
    return (torch.randn(TOKENS, width, generator=generator) * spectrum) @ directions.T * channels


def _grams(inputs: Tensor) -> tuple[Tensor, Tensor]:
    fitted, held_out = inputs.split([TOKENS * 3 // 4, TOKENS // 4])
    return fitted.T @ fitted, held_out.T @ held_out
