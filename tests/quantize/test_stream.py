from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from backend.errors import DataError
from backend.formats.skeleton import read_config
from backend.quantize.architecture import describe
from backend.quantize.calibrate import calibrate
from backend.quantize.stream import LayerStream, WeightFiles
from tests.quantize.tiny import make_model, tokens

CPU = torch.device("cpu")


def make_stream(folder: Path, ids: torch.Tensor, microbatch: int | None = None) -> LayerStream:
    architecture = describe(read_config(folder), torch.float32)
    return LayerStream(architecture, WeightFiles(folder), ids, CPU, torch.float32, microbatch)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("qwen2", {}), ("qwen3", {}), ("mistral", {"sliding_window": 6}),
     ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}})],
)  # fmt: skip
@pytest.mark.parametrize("microbatch", [1, 4, None])
def test_streamed_activations_are_the_models_own(
    tmp_path: Path, kind: str, changes: dict[str, object], microbatch: int | None
) -> None:
    folder = make_model(tmp_path, kind, torch.float32, num_hidden_layers=3, **changes)
    ids = tokens(6, 20)
    stream = make_stream(folder, ids, microbatch)
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        hidden = whole.model(ids, output_hidden_states=True).hidden_states
        for index in range(3):
            torch.testing.assert_close(torch.cat(stream.parts), hidden[index], rtol=1e-4, atol=1e-4)
            with stream.layer(index) as layer:
                stream.advance(index, layer)
        torch.testing.assert_close(whole.model.norm(torch.cat(stream.parts)), hidden[3], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_grams_are_those_of_the_linears_inputs_whatever_the_microbatch(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "llama", torch.float32)
    ids = tokens(5, 20)
    inputs: dict[str, torch.Tensor] = {}
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for name, module in whole.model.layers[1].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, 1)))
    whole(ids)
    for microbatch in (1, 2, 5):
        stream = make_stream(folder, ids, microbatch)
        for index in range(2):
            with stream.layer(index) as layer:
                grams = calibrate(stream, index, layer)
        assert len(grams) == 4
        for group, gram in grams.items():
            for name in group.linears:
                x = inputs[name]
                error = (gram.H.double() - x.T @ x).norm() / (x.T @ x).norm()
                assert error < 1e-4, (microbatch, name)
            assert gram.tokens == 100


@torch.no_grad()
def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    folder = make_model(tmp_path, num_hidden_layers=4)
    stream = make_stream(folder, tokens(2, 16))
    alive: list[weakref.ref[torch.Tensor]] = []
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
            stream.advance(index, layer)
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
def test_bad_tokens(tmp_path: Path, ids: torch.Tensor, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        make_stream(make_model(tmp_path), ids)
