"""NVFP4 against a float64 reference that knows its types only from their definition: sign, exponent, mantissa."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backend.errors import CheckpointError
from backend.formats.bits import measured_bits
from backend.formats.decode_path import decode_path
from backend.formats.headers import read_headers
from backend.formats.loader import load_model
from backend.formats.modelopt_layout import ModeloptScheme
from backend.formats.modelopt_linear import NVFP4, ModeloptLinear, ModeloptWeight, to_e2m1
from backend.formats.size import is_layer_linear, predicted_modelopt_size, weight_bytes
from tests.formats.models import make_model

BLOCK = 16


def minifloats(exponents: int, mantissas: int, bias: int, count: int) -> Tensor:
    """The non-negative numbers of a small float type in order of their codes, float64."""
    numbers = []
    for code in range(count):
        exponent, mantissa = code >> mantissas, (code & ((1 << mantissas) - 1)) / (1 << mantissas)
        numbers.append(mantissa * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa) * 2.0 ** (exponent - bias))
    assert count <= 1 << (exponents + mantissas)
    return torch.tensor(numbers, dtype=torch.float64)


E2M1 = minifloats(2, 1, 1, 8)
E4M3 = minifloats(4, 3, 7, 127)  # the last code is NaN


def nearest(x: Tensor, numbers: Tensor) -> Tensor:
    """The nearest numbers of a type to float64 values; of two as near the one with the even code."""
    gaps = (x.abs().unsqueeze(-1) - numbers).abs()
    best = gaps.amin(-1, keepdim=True)
    codes = torch.arange(len(numbers))
    chosen = torch.where(gaps == best, codes + len(numbers) * (codes % 2), 10 * len(numbers)).argmin(-1)
    return torch.copysign(numbers[chosen], x)


def reference(x: Tensor, scale: float) -> Tensor:
    """NVFP4's values for x (rows, in), with what 1 stands for where a block's scale is 1; float64."""
    blocks = x.double().view(len(x), -1, BLOCK) / scale
    steps = nearest((blocks.abs().amax(-1, keepdim=True) / 6).clamp(2.0**-9, 448), E4M3)
    return (nearest(blocks / steps, E2M1) * steps * scale).view(x.shape)


def test_ties_go_to_the_even_code() -> None:
    ties = (E2M1[1:] + E2M1[:-1]) / 2
    x = torch.cat((ties, -ties, E2M1, torch.tensor([100.0, -100.0], dtype=torch.float64)))
    assert torch.equal(to_e2m1(x.float()).double(), nearest(x, E2M1))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder as modelopt stores NVFP4, packed by its own code, and the float32 model it was made of."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    source = make_model(tmp_path_factory.mktemp("source"), dtype=torch.float32)
    folder = tmp_path_factory.mktemp("nvfp4")
    tensors = load_file(source / "model.safetensors")
    for name, weight in list(tensors.items()):
        if is_layer_linear(name, tuple(weight.shape)):
            quantized, scale, double = NVFP4QTensor.quantize(weight.clone(), BLOCK)
            prefix = name.removesuffix(".weight")
            tensors[name] = quantized._quantized_data
            tensors[f"{prefix}.weight_scale"] = scale
            tensors[f"{prefix}.weight_scale_2"] = double.reshape(())
            tensors[f"{prefix}.input_scale"] = torch.tensor(3.0 / (6 * 448))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": BLOCK, "ignore": ["lm_head"],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder, source


def test_weights_are_those_of_the_reference(packed: tuple[Path, Path]) -> None:
    folder, source = packed
    model = load_model(folder, dtype=torch.float32)
    assert decode_path(model).endswith("NVFP4 rounding of inputs simulated")
    checked = 0
    for name, weight in load_file(source / "model.safetensors").items():
        if is_layer_linear(name, tuple(weight.shape)):
            expected = reference(weight, float(weight.abs().max()) / (6 * 448))
            found = model.get_submodule(name.removesuffix(".weight")).weight.double()
            # 1e-6: float32. A weight that float32 takes to be on the other side of a tie would be off by a step.
            off = (found - expected).abs() > 1e-6 * weight.abs().max()
            assert off.double().mean() < 1e-4, name
            checked += 1
    assert checked == 14


def test_inputs_are_rounded_as_by_the_reference() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 64, generator=generator) * torch.logspace(-3, 1, 9).unsqueeze(1)
    x[0, :BLOCK] = 0
    weight, bias = torch.randn(24, 64, generator=generator), torch.randn(24, generator=generator)
    scale = torch.tensor(float(x.abs().max()) / (6 * 448) / 2)  # half of what is needed: the largest are cut off
    linear = ModeloptLinear(
        ModeloptWeight(weight, "NVFP4", None, scale, NVFP4), bias, dtype=torch.float32, device="cpu"
    )
    expected = reference(x, float(scale)) @ weight.double().t() + bias.double()
    assert torch.allclose(linear(x).double(), expected, rtol=1e-5, atol=1e-5)
    plain = x.double() @ weight.double().t() + bias.double()
    assert not torch.allclose(expected, plain, rtol=1e-2, atol=1e-2)  # there is something to see


def test_size_and_bits(packed: tuple[Path, Path]) -> None:
    folder, source = packed
    config = json.loads((source / "config.json").read_text())
    size = predicted_modelopt_size(read_headers(source), config, ModeloptScheme("NVFP4"), dtype=None)
    assert size == weight_bytes(folder)
    bits = measured_bits(folder).quantized
    assert bits is not None and 4.5 < bits < 4.51  # 4, 8 / 16 for the blocks' scales, and one number per Linear


def test_bfloat16_adds_its_own_rounding_alone(packed: tuple[Path, Path]) -> None:
    name = "model.layers.1.mlp.down_proj"
    wide = load_model(packed[0], dtype=torch.float32).get_submodule(name)
    narrow = load_model(packed[0]).get_submodule(name)
    x = torch.randn(32, 256, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    expected, found = wide(x.float()), narrow(x)
    assert found.dtype == torch.bfloat16
    # Weight, rounded inputs and result are each rounded once more, by 2^-9 of themselves at most.
    assert (found.float() - expected).norm() < 3 * 2.0**-9 * expected.norm()


def test_another_block_size_is_refused(packed: tuple[Path, Path], tmp_path: Path) -> None:
    config = json.loads((packed[0] / "config.json").read_text())
    config["quantization_config"]["group_size"] = 32
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(packed[0] / "model.safetensors")
    with pytest.raises(CheckpointError, match="group_size is 32; NVFP4 has 16"):
        load_model(tmp_path)
