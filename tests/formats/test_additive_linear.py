"""The CPU kernel against a float64 product, its independence of threads, and which way a weight is run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from backend.formats import lut_kernel
from backend.formats.additive_linear import AdditiveLinear, DequantizedLinear, additive_linear
from backend.formats.additive_weight import AdditiveWeight
from backend.formats.aqlm_package import PackageLinear, package_problem
from backend.formats.decode_path import decode_path, warm_up
from backend.formats.loader import load_model
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.recipe import Recipe, Scheme
from tests.formats.additive import random_additive, write_additive
from tests.formats.models import make_model, write

pytest.importorskip("numba")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("scheme", "out", "width"),
    [
        (AdditiveScheme(2, 8, 8), 256, 128),
        (AdditiveScheme(1, 8, 8), 100, 264),
        (AdditiveScheme(3, 8, 8), 1000, 104),
        (AdditiveScheme(8, 8, 32), 48, 96),
        (AdditiveScheme(2, 5, 4), 33, 44),
        (AdditiveScheme(4, 1, 8), 8, 8),
        (AdditiveScheme(2, 8, 16), 2050, 128),
    ],
    ids=lambda v: getattr(v, "label", str(v)),
)
def test_few_rows_equal_the_float64_product(scheme: AdditiveScheme, out: int, width: int) -> None:
    weight, bias = random_additive(out, width, scheme), inputs(out)
    linear = AdditiveLinear(weight, bias, dtype=torch.float32)
    exact = weight.dequantize(torch.float64)
    for rows in (1, 3, AdditiveLinear.MAX_ROWS):
        x = inputs(rows, width)
        expected = x.double() @ exact.T + bias
        # Sums of `in` float32 products: well below 1e-5 of the size of the numbers summed.
        bound = 1e-6 * (x.abs().double() @ exact.abs().T + bias.abs())
        assert bool(((linear(x) - expected).abs() <= bound).all())
    assert torch.equal(linear.dequantize(), weight.dequantize())
    many = inputs(2, 20, width)
    assert torch.equal(linear(many), nn.functional.linear(many, weight.dequantize(), bias))
    assert linear(inputs(1, 1, width)).shape == (1, 1, out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs(dtype: torch.dtype) -> None:
    weight, bias = random_additive(384, 256, AdditiveScheme(2, 8, 8)), inputs(384).to(dtype)
    linear = AdditiveLinear(weight, bias, dtype=dtype)
    x = inputs(2, 256).to(dtype)
    y = linear(x)
    expected = (x.double() @ weight.dequantize(torch.float64).T + bias.double()).to(dtype)  # rounded once, at the end
    assert y.dtype == dtype
    step = torch.finfo(dtype).eps * expected.abs().clamp(min=1e-3).float()
    assert bool(((y - expected).abs().float() <= step).all())
    assert torch.equal(linear.dequantize(), weight.dequantize(dtype))


def test_any_number_of_threads_gives_the_same_bits() -> None:
    """Large enough to be shared out among threads, which makes aqlm 1.1.7's own kernel give wrong numbers."""
    weight = random_additive(1030, 4096, AdditiveScheme(2, 8, 8))
    linear = AdditiveLinear(weight, dtype=torch.float32)
    assert linear.codes.numel() > lut_kernel.PARALLEL_LOOKUPS
    exact = weight.dequantize(torch.float64)
    for rows in (1, 5):
        x = inputs(rows, 4096)
        torch.set_num_threads(1)
        alone = linear(x)
        assert (alone - x.double() @ exact.T).norm() < 1e-6 * alone.norm()
        torch.set_num_threads(2)
        for _ in range(20):
            assert torch.equal(linear(x), alone)


def test_training_through_it_gives_the_inputs_gradient() -> None:
    weight = random_additive(64, 64, AdditiveScheme(2, 4, 8))
    x = inputs(3, 64).requires_grad_()
    AdditiveLinear(weight, dtype=torch.float32)(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.dequantize().sum(0).expand(3, 64))


@pytest.mark.parametrize("scheme", [AdditiveScheme(1, 12, 8), AdditiveScheme(2, 9, 8)], ids=lambda s: s.label)
def test_larger_codebooks_are_dequantised_once(scheme: AdditiveScheme) -> None:
    weight, bias = random_additive(512, 128, scheme), inputs(512)
    linear = additive_linear(weight, bias, dtype=torch.bfloat16, device="cpu")
    assert isinstance(linear, DequantizedLinear)
    assert torch.equal(linear.weight, weight.dequantize(torch.bfloat16))
    packed = additive_linear(weight, bias, dtype=torch.bfloat16, device="cpu", packed=True)
    assert isinstance(packed, AdditiveLinear) and not packed.look_up
    x = inputs(2, 128).bfloat16()
    assert torch.equal(packed(x), linear(x))
    assert packed.codes.nbytes < linear.weight.nbytes


@pytest.mark.parametrize("scheme", [AdditiveScheme(1, 12, 8), AdditiveScheme(1, 16, 8)], ids=lambda s: s.label)
def test_the_packages_linear_is_given_the_same_weight(scheme: AdditiveScheme) -> None:
    """On the CPU the package dequantises such codebooks at every call: slow, but it shows what it was given."""
    pytest.importorskip("aqlm")
    weight, bias = random_additive(512, 128, scheme), inputs(512)
    linear = PackageLinear(weight, bias, dtype=torch.float32, device="cpu")
    x = inputs(3, 128)
    torch.testing.assert_close(linear(x), nn.functional.linear(x, weight.dequantize(), bias), rtol=1e-6, atol=1e-6)
    assert package_problem((1, scheme.nbits_per_codebook, 8), torch.float32, CPU) == ""


def test_a_kernel_that_does_not_run_is_told() -> None:
    pytest.importorskip("aqlm")
    problem = package_problem((2, 8, 8), torch.bfloat16, CPU)  # its CPU kernel takes float32 alone
    assert "do not run: please load the model with `torch_dtype=torch.float32`" in problem


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scheme", [(2, 8, 8), (1, 16, 8), (1, 8, 8), (3, 8, 8)])
def test_on_cuda(scheme: tuple[int, int, int], dtype: torch.dtype) -> None:
    weight, bias = random_additive(1024, 1024, AdditiveScheme(*scheme)), inputs(1024)
    linear = additive_linear(weight, bias, dtype=dtype, device="cuda")
    for rows in (1, 40):
        x = inputs(rows, 1024).to(dtype)
        expected = x.double() @ weight.dequantize(torch.float64).T + bias
        assert (linear(x.cuda()).double().cpu() - expected).norm() < 0.01 * expected.norm()
    print(decode_path(linear))


def test_the_way_is_told(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    assert decode_path(load_model(source)) == "bfloat16 weights"
    codes = write_additive(source, tmp_path / "codes", AdditiveScheme(2, 8, 8))
    assert decode_path(load_model(codes)) == "AQLM 2x8 g8: look-up tables over packed codes (numba)"
    large = write_additive(source, tmp_path / "large", AdditiveScheme(1, 12, 8))
    assert decode_path(load_model(large)) == "AQLM 1x12 g8: dequantised once at load, bfloat16"
    assert decode_path(load_model(large, packed_codes=True)) == "AQLM 1x12 g8: dequantised at every call"
    int4 = write(source, tmp_path / "int4", Recipe("r", Scheme("RTN", 4, 32)))
    assert "int4" in decode_path(load_model(int4))
    int8 = write(source, tmp_path / "int8", Recipe("r", Scheme("RTN", 8, 32)))
    assert decode_path(load_model(int8)) == "packed int4 kernel on two planes of 8-bit codes"
    lut_kernel._look_up.cache_clear()
    for folder in (source, large, int4):
        warm_up(folder)
    assert lut_kernel._look_up.cache_info().currsize == 0
    warm_up(codes)
    assert lut_kernel._look_up.cache_info().currsize >= 1


def dense_twin(folder: Path, source: Path) -> nn.Module:
    """The 16-bit model with the dequantised weights, and the other tensors as they are stored."""
    from backend.formats.additive_reader import read_additive, read_unquantized

    model = load_model(source, dtype=torch.float32)
    state = {name: tensor.float() for name, tensor in read_unquantized(folder)}
    state |= {f"{name}.weight": weight.dequantize() for name, weight in read_additive(folder)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model


@pytest.mark.parametrize("scheme", [AdditiveScheme(2, 8, 8), AdditiveScheme(1, 12, 8)], ids=lambda s: s.label)
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True, "intermediate_size": 260}),
        ("qwen2", {}),
    ],
)
def test_generation_equals_that_of_the_dequantised_model(
    tmp_path: Path, scheme: AdditiveScheme, kind: str, changes: dict[str, object]
) -> None:
    source = make_model(tmp_path / "source", kind, torch.float32, **changes)
    folder = write_additive(source, tmp_path / "out", scheme)
    ours, dense = load_model(folder, dtype=torch.float32), dense_twin(folder, source)
    for length in (5, 30):  # a prompt of few rows, and one of many
        ids = torch.randint(3, 96, (1, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-5)
        options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(ours.generate(ids, **options), dense.generate(ids, **options))
        bf16 = load_model(folder)
        with torch.no_grad():
            assert (bf16(ids).logits.float() - dense(ids).logits).norm() < 0.03 * dense(ids).logits.norm()


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from backend.errors import CheckpointError
    from backend.formats.headers import SINGLE_FILE

    source = make_model(tmp_path / "source", "qwen2")
    folder = write_additive(source, tmp_path / "out", AdditiveScheme(2, 8, 8))
    whole = load_file(folder / SINGLE_FILE)
    up, q = "model.layers.0.mlp.up_proj", "model.layers.0.self_attn.q_proj"
    other: AdditiveWeight = random_additive(64, 128, AdditiveScheme(2, 8, 8))
    from backend.formats.aqlm import pack

    cases: list[tuple[dict[str, Tensor | None], str]] = [
        ({f"{up}.codebooks": None}, f"{up} lacks codebooks"),
        ({f"{up}.codes": None}, r"tensor .*up_proj.weight .*in none"),
        ({f"{up}.codes": whole[f"{up}.codes"].to(torch.int16)}, f"{up}: codes are torch.int16"),
        ({f"{up}.codebooks": whole[f"{up}.codebooks"][:1].contiguous()}, f"{up}: .*have shapes"),
        ({f"{up}.{part}": t for part, t in pack(other).items()}, r"up_proj unpacks to \(64, 128\); the model needs"),
        ({f"{up}.weight": torch.ones(256, 128).half()}, f"{up} is also stored unpacked"),
        ({f"{q}.bias": None}, f"{q}.bias is in none"),
        ({"model.layers.9.up.codes": torch.zeros(8, 1, 2, dtype=torch.int8)}, "of another model"),
    ]
    for changes, reason in cases:
        tensors = {name: t for name, t in (whole | changes).items() if t is not None}
        save_file(tensors, folder / SINGLE_FILE)
        with pytest.raises(CheckpointError, match=reason):
            load_model(folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["num_codebooks"] = 1
    save_file(whole, folder / SINGLE_FILE)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="have shapes.*aqlm-1x8-g8 needs"):
        load_model(folder)
