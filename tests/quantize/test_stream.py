from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from backend.errors import DataError
from backend.formats.skeleton import read_config
from backend.quantize.architecture import describe
from backend.quantize.calibrate import calibrate
from backend.quantize.stream import LayerStream
from backend.quantize.weights import WeightFiles
from tests.formats.crash import digest
from tests.quantize.tiny import AWQ, make_model, quantize_all, recipe, tokens

CPU = torch.device("cpu")


def make_stream(model: Path, ids: Tensor, lengths: Tensor | None = None, **options: Any) -> LayerStream:
    architecture = describe(read_config(model), torch.float32)
    return LayerStream(architecture, WeightFiles(model), ids, lengths, CPU, torch.float32, **options)


def hidden_states(stream: LayerStream) -> Tensor:
    return torch.cat([stream.activations.read(number) for number in range(len(stream.activations))])


def advance(stream: LayerStream, index: int) -> list[Tensor | None]:
    with stream.layer(index) as layer:
        return list(stream.advance(index, layer))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("qwen2", {}), ("qwen3", {}), ("mistral", {"sliding_window": 6}),
     ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}})],
)  # fmt: skip
@pytest.mark.parametrize("microbatch", [1, 4, None])
@torch.no_grad()
def test_streamed_activations_are_the_models_own(
    tmp_path: Path, kind: str, changes: dict[str, Any], microbatch: int | None
) -> None:
    folder = make_model(tmp_path, kind, torch.float32, num_hidden_layers=3, **changes)
    ids = tokens(6, 20)
    stream = make_stream(folder, ids, microbatch=microbatch, memory_limit=0 if microbatch == 4 else 10**9)
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    hidden = whole.model(ids, output_hidden_states=True).hidden_states
    for index in range(3):
        torch.testing.assert_close(hidden_states(stream), hidden[index], rtol=1e-4, atol=1e-4)
        assert torch.equal(stream.probe(), hidden_states(stream)[:1])
        assert advance(stream, index) == [None] * len(stream.activations)
    torch.testing.assert_close(whole.model.norm(hidden_states(stream)), hidden[3], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def grams_of_the_model(folder: Path, samples: list[Tensor], layer: int) -> dict[str, tuple[Tensor, Tensor, int]]:
    """For each Linear H, mean |x| and the number of tokens, from the whole model on each sample alone, float64."""
    inputs: dict[str, list[Tensor]] = {}
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, module in whole.model.layers[layer].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].flatten(0, 1))
            )
    for sample in samples:
        whole(sample[None])
    together = {name: torch.cat(parts) for name, parts in inputs.items()}
    return {name: (x.T @ x, x.abs().mean(0), len(x)) for name, x in together.items()}


def check_grams(stream: LayerStream, expected: dict[str, tuple[Tensor, Tensor, int]], last: int) -> None:
    for index in range(last + 1):
        with torch.no_grad(), stream.layer(index) as layer:
            grams = calibrate(stream, index, layer)
    assert sorted(name for group in grams for name in group.linears) == sorted(expected)
    assert len(grams) == 4
    for group, gram in grams.items():
        for name in group.linears:
            H, mean_abs, count = expected[name]  # noqa: N806
            assert gram.tokens == count
            assert (gram.H.double() - H).norm() < 1e-4 * H.norm(), name
            torch.testing.assert_close(gram.mean_abs.double(), mean_abs, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("microbatch", [1, 2, 5])
def test_grams_are_those_of_the_linears_inputs_whatever_the_microbatch(tmp_path: Path, microbatch: int) -> None:
    folder = make_model(tmp_path, "llama", torch.float32)
    ids = tokens(5, 20)
    check_grams(make_stream(folder, ids, microbatch=microbatch), grams_of_the_model(folder, list(ids), 1), 1)


@pytest.mark.parametrize("lengths", [[20, 3, 11, 1, 20, 11], [7, 7, 7, 7, 7, 7], [1, 2, 3, 4, 5, 20]])
@pytest.mark.parametrize("microbatch", [1, 4, None])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_padding_is_not_seen(tmp_path: Path, kind: str, lengths: list[int], microbatch: int | None) -> None:
    """Whatever stands behind a sample's text: the Grams are those of the samples without it, each run alone."""
    changes: dict[str, Any] = {"sliding_window": 6} if kind == "mistral" else {}
    folder = make_model(tmp_path, kind, torch.float32, **changes)
    ids = tokens(6, 20)
    expected = grams_of_the_model(folder, [row[:n] for row, n in zip(ids, lengths, strict=True)], 1)
    limit = 0 if microbatch == 4 else 10**9
    stream = make_stream(folder, ids, torch.tensor(lengths), microbatch=microbatch, memory_limit=limit)
    check_grams(stream, expected, 1)


def test_padding_costs_little(tmp_path: Path) -> None:
    """Samples of like length run together, cut to the longest of them."""
    folder = make_model(tmp_path)
    stream = make_stream(folder, tokens(6, 20), torch.tensor([3, 20, 4, 19, 3, 20]), microbatch=3)
    assert stream.activations.nbytes == (3 * 20 + 3 * 4) * 64 * 4
    masks = advance(stream, 0)
    assert [None if m is None else m.sum(1).tolist() for m in masks] == [[20, 20, 19], [4, 3, 3]]


@pytest.mark.parametrize("lengths", [None, [24, 24, 9, 17, 24, 2]])
def test_activations_on_disk_change_nothing(tmp_path: Path, lengths: list[int] | None) -> None:
    source = make_model(tmp_path / "source")
    recipes = [AWQ, recipe("GPTQ", 3)]
    reports = [
        quantize_all(
            source, tmp_path / str(limit), recipes, microbatch=2, memory_limit=limit, checkpoint_dir=folder,
            lengths=None if lengths is None else torch.tensor(lengths),
        )
        for limit, folder in ((10**9, None), (0, None), (1, tmp_path / "checkpoint"))
    ]  # fmt: skip
    for limit in (0, 1):
        for r in recipes:
            assert digest(tmp_path / str(limit) / r.name) == digest(tmp_path / str(10**9) / r.name)
    errors = [[layer.relative_error for layer in report.layers] for report in reports]
    assert errors[0] == errors[1] == errors[2]
    assert reports[0].tokens == (144 if lengths is None else 100)


@torch.no_grad()
def test_it_starts_where_its_activations_are(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", num_hidden_layers=3)
    for limit in (0, 10**9):
        folder = tmp_path / str(limit)
        stream = make_stream(source, tokens(), folder=folder, memory_limit=limit)
        assert stream.start == 0
        advance(stream, 0)
        advance(stream, 1)
        expected = hidden_states(stream)
        again = make_stream(source, tokens(), folder=folder, memory_limit=limit, start=2)
        assert again.start == 2
        assert torch.equal(hidden_states(again), expected)
        lost = make_stream(source, tokens(5), folder=folder, memory_limit=limit, start=2)  # of another size
        assert lost.start == 0
        assert torch.equal(lost.probe(), make_stream(source, tokens(5)).probe())


@torch.no_grad()
def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    folder = make_model(tmp_path, num_hidden_layers=4)
    stream = make_stream(folder, tokens(2, 16))
    alive: list[weakref.ref[Tensor]] = []
    model = stream._architecture.model
    assert all(p.is_meta for p in model.parameters())  # the embedding is gone already
    for index in range(4):
        gc.collect()
        assert not any(ref() is not None for ref in alive)
        with stream.layer(index) as layer:
            alive = [weakref.ref(p) for p in layer.parameters()]
            assert alive
            real = {n for n, p in model.named_parameters() if not p.is_meta}
            assert all(n.startswith(f"model.layers.{index}.") for n in real)
            list(stream.advance(index, layer))
        del layer


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        (torch.zeros(0, 8, dtype=torch.long), "shape"),
        (torch.zeros(8, dtype=torch.long), "shape"),
        (torch.full((2, 8), 96), "another model's tokenizer"),
        (torch.full((2, 8), -1), "another model's tokenizer"),
    ],
)
def test_bad_tokens(tmp_path: Path, ids: Tensor, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        make_stream(make_model(tmp_path), ids)


@pytest.mark.parametrize("lengths", [[8], [8, 0], [9, 8], [8, 8, 8]])
def test_bad_lengths(tmp_path: Path, lengths: list[int]) -> None:
    with pytest.raises(DataError, match="Lengths of 2 samples must be 1 to 8 each"):
        make_stream(make_model(tmp_path), tokens(2, 8), torch.tensor(lengths))
