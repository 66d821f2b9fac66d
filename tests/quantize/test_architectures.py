"""Every supported family: the skeleton, the way into the layers, the groups of Linears and the places for scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3Config,
    GPTJConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)

from backend.errors import DataError, ModelError
from backend.formats.headers import SINGLE_FILE
from backend.formats.skeleton import attention_of, build_skeleton, read_config
from backend.quantize.architecture import describe
from backend.quantize.check import checked_architecture
from backend.quantize.embed import Embedder, LayerCall
from backend.quantize.fold import Fold, apply_fold, verify
from backend.quantize.groups import GroupWatcher, InputGroup
from backend.quantize.producers import FoldFinder
from backend.quantize.weights import WeightFiles
from tests.quantize.models import KINDS, config, make_model, tokens

CPU = torch.device("cpu")
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}  # fmt: skip
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in KINDS),
    ("llama", {"rope_parameters": ROPE}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    ("mistral", {"sliding_window": 6}),
    ("phi3", {"num_key_value_heads": 1, "sliding_window": 6}),
    ("opt", {"word_embed_proj_dim": 32}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("gemma2", {"attn_logit_softcapping": None}),
]
OTHERS = {
    "falcon": FalconConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2,
                           new_decoder_architecture=True),
    "bloom": BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4),
    "gptj": GPTJConfig(vocab_size=96, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64),
}  # fmt: skip

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATED = ("mlp.gate_proj", "mlp.up_proj")
LLAMA_LIKE = {
    QKV: ("input_layernorm", None, 0.0),
    ("self_attn.o_proj",): ("self_attn.v_proj", range(32), 0.0),
    GATED: ("post_attention_layernorm", None, 0.0),
    ("mlp.down_proj",): ("mlp.up_proj", range(128), 0.0),
}
GEMMA_LIKE = {
    QKV: ("input_layernorm", None, 1.0),
    ("self_attn.o_proj",): ("self_attn.v_proj", range(32), 0.0),
    GATED: ("pre_feedforward_layernorm", None, 1.0),
    ("mlp.down_proj",): ("mlp.up_proj", range(128), 0.0),
}
EXPECTED: dict[str, dict[tuple[str, ...], Any]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LLAMA_LIKE),
    **dict.fromkeys(("gemma2", "gemma3"), GEMMA_LIKE),
    "phi3": {
        ("self_attn.qkv_proj",): ("input_layernorm", None, 0.0),
        ("self_attn.o_proj",): ("self_attn.qkv_proj", range(96, 128), 0.0),
        ("mlp.gate_up_proj",): ("post_attention_layernorm", None, 0.0),
        ("mlp.down_proj",): ("mlp.gate_up_proj", range(128, 256), 0.0),
    },
    "opt": {
        QKV: ("self_attn_layer_norm", None, 0.0),
        ("self_attn.out_proj",): ("self_attn.v_proj", range(64), 0.0),
        ("fc1",): ("final_layer_norm", None, 0.0),
        ("fc2",): ("fc1", range(128), 0.0),
    },
    "gpt_neox": {
        ("attention.query_key_value",): ("input_layernorm", None, 0.0),
        ("attention.dense",): ("attention.query_key_value", [r for r in range(192) if r % 48 >= 32], 0.0),
        ("mlp.dense_h_to_4h",): ("post_attention_layernorm", None, 0.0),
        ("mlp.dense_4h_to_h",): None,  # a GELU lies between
    },
}


def real_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    attention = attention_of(read_config(folder))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


# The skeleton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_skeleton_is_the_real_model_without_its_weights(
    tmp_path: Path, kind: str, changes: dict[str, Any], dtype: torch.dtype
) -> None:
    folder = make_model(tmp_path, kind, **changes)
    real, skeleton = real_model(folder, dtype), build_skeleton(read_config(folder), dtype)
    assert all(p.is_meta for p in skeleton.parameters())
    assert {n: (p.shape, p.dtype) for n, p in skeleton.named_parameters()} == {
        n: (p.shape, p.dtype) for n, p in real.named_parameters()
    }
    buffers, expected = dict(skeleton.named_buffers()), dict(real.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        assert buffer.dtype == expected[name].dtype
        torch.testing.assert_close(buffer, expected[name], rtol=0, atol=0)
    assert not skeleton.training
    assert nn.Linear(2, 2).weight.device == CPU  # what building a skeleton changed is back


@pytest.mark.parametrize("kind", KINDS)
def test_tied_heads_stay_tied(kind: str) -> None:
    tied = build_skeleton(config(kind, tie_word_embeddings=True), torch.float32)
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    free = build_skeleton(config(kind), torch.float32)
    assert free.get_output_embeddings().weight is not free.get_input_embeddings().weight


def test_stored_buffers_are_left_to_the_files() -> None:
    """A loader tells by the meta device what it has to read."""
    skeleton = build_skeleton(OTHERS["falcon"], torch.float32)
    assert all(not b.is_meta for b in skeleton.buffers())
    with_state = BloomConfig(vocab_size=96, hidden_size=64, n_layer=1, n_head=4)
    original = nn.LayerNorm.__init__

    def init(self: nn.LayerNorm, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.register_buffer("steps", torch.zeros(1))

    nn.LayerNorm.__init__ = init  # type: ignore[method-assign]
    try:
        skeleton = build_skeleton(with_state, torch.float32)
    finally:
        nn.LayerNorm.__init__ = original  # type: ignore[method-assign]
    assert skeleton.transformer.ln_f.steps.is_meta


# What a model is made of


@pytest.mark.parametrize(
    ("kind", "path"),
    [(kind, {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}.get(kind, "model.layers")) for kind in KINDS]
    + [("falcon", "transformer.h"), ("bloom", "transformer.h"), ("gptj", "transformer.h")],
)
def test_layers_embedding_and_head_are_found(kind: str, path: str) -> None:
    architecture = describe(OTHERS.get(kind) or config(kind, num_hidden_layers=2), torch.float32)
    assert architecture.layers_path == path
    assert len(architecture.layers) == 2
    assert architecture.vocabulary == 96
    assert architecture.head == "lm_head"
    linears = architecture.linears(1)
    if kind in EXPECTED:
        assert set(linears) == {name for group in EXPECTED[kind] for name in group}


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (Gemma3Config(), "Gemma3Config cannot.*several stacks of layers.*vision_tower"),
        (
            Qwen3NextConfig(num_experts=0, hidden_size=64, intermediate_size=64, num_hidden_layers=1, vocab_size=96),
            "no Linear's weight",
        ),
    ],
)
def test_what_cannot_be_streamed_is_refused(other: Any, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        describe(other, torch.float32)


# From tokens to the layers


@torch.no_grad()
def run_streamed(folder: Path, ids: Tensor) -> list[Tensor]:
    """Hidden states before each layer and after the last, with one layer's weights loaded at a time."""
    architecture = checked_architecture(folder, torch.float32)
    weights = WeightFiles(folder)
    with Embedder(architecture, weights, CPU, torch.float32) as embed:
        parts = [embed(part) for part in ids.split(2)]
    assert all(p.is_meta for p in architecture.model.parameters())
    states = [torch.cat([hidden for hidden, _ in parts])]
    for index, layer in enumerate(architecture.layers):
        prefix = f"{architecture.layers_path}.{index}."
        names = {name: architecture.stored_name(prefix + name) for name, _ in layer.named_parameters()}
        read = weights.read(list(names.values()), CPU, torch.float32)
        layer.load_state_dict({name: read[stored] for name, stored in names.items()}, assign=True)
        outputs = []
        for (_, calls), hidden in zip(parts, states[-1].split(2), strict=True):
            assert isinstance(calls[index], LayerCall)
            output = layer(hidden, *calls[index].args, **calls[index].kwargs)
            outputs.append(output[0] if isinstance(output, tuple) else output)
        states.append(torch.cat(outputs))
    return states


@torch.no_grad()
def run_whole(folder: Path, ids: Tensor) -> list[Tensor]:
    real = real_model(folder)
    seen: dict[int, Tensor] = {}
    outputs: list[Tensor] = []

    def before(index: int) -> Any:
        return lambda _, args, kwargs: seen.__setitem__(index, args[0] if args else kwargs["hidden_states"])

    layers = real.get_submodule(describe(real.config).layers_path)
    for index, layer in enumerate(layers):
        layer.register_forward_pre_hook(before(index), with_kwargs=True)
    layers[-1].register_forward_hook(lambda _, args, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    real(ids, use_cache=False)
    return [*(seen[index] for index in range(len(layers))), outputs[0]]


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_layers_run_one_by_one_give_the_models_own_hidden_states(
    tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    folder = make_model(tmp_path, kind, torch.float32, num_hidden_layers=2, **changes)
    ids = tokens(5, 20)
    for streamed, whole in zip(run_streamed(folder, ids), run_whole(folder, ids), strict=True):
        torch.testing.assert_close(streamed, whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", OTHERS)
def test_models_whose_layers_return_tuples(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(OTHERS[kind]).save_pretrained(tmp_path)
    ids = tokens(5, 20)
    for streamed, whole in zip(run_streamed(tmp_path, ids), run_whole(tmp_path, ids), strict=True):
        torch.testing.assert_close(streamed, whole, rtol=1e-5, atol=1e-5)


def test_files_that_leave_out_the_bodys_prefix(tmp_path: Path) -> None:
    folder = make_model(tmp_path, "opt", torch.float32)
    ids = tokens(3, 12)
    before = run_whole(folder, ids)
    stored = load_file(folder / SINGLE_FILE)
    save_file({n.removeprefix("model."): t for n, t in stored.items()}, folder / SINGLE_FILE, metadata={"format": "pt"})
    for streamed, whole in zip(run_streamed(folder, ids), before, strict=True):
        torch.testing.assert_close(streamed, whole, rtol=1e-5, atol=1e-5)


def test_softcapped_attention_is_computed_as_the_model_says(tmp_path: Path) -> None:
    """torch's fused attention would leave the cap out, and nobody would notice."""
    folder = make_model(tmp_path, "gemma2", torch.float32)
    own = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    fused = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    ids = tokens(2, 16)
    with torch.no_grad():
        assert (own(ids).logits - fused(ids).logits).abs().max() > 1e-3
    assert attention_of(read_config(folder)) == "eager"
    assert attention_of(config("gemma3")) == attention_of(config("llama")) == "sdpa"


@pytest.mark.parametrize("kind", KINDS)
def test_inside_the_embedder_only_the_layers_and_the_head_are_missing(tmp_path: Path, kind: str) -> None:
    for tied in (False, True):
        folder = make_model(tmp_path / str(tied), kind, tie_word_embeddings=tied)
        architecture = checked_architecture(folder, torch.float32)
        model, layers = architecture.model, architecture.layers
        with Embedder(architecture, WeightFiles(folder), CPU, torch.float32):
            absent = {name for name, p in model.named_parameters(remove_duplicate=False) if p.is_meta}
            assert absent == {"lm_head.weight"}
        assert architecture.layers is layers
        assert all(p.is_meta for p in model.parameters())
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_an_error_inside_the_embedder_leaves_the_skeleton_as_it_was(tmp_path: Path) -> None:
    architecture = checked_architecture(make_model(tmp_path), torch.float32)
    layers = architecture.layers
    with pytest.raises(IndexError), Embedder(architecture, WeightFiles(tmp_path), CPU, torch.float32) as embed:
        embed(torch.full((1, 4), 96))
    assert architecture.layers is layers
    assert all(p.is_meta for p in architecture.model.parameters())


def test_learned_positions_limit_the_length(tmp_path: Path) -> None:
    for kind, learns in (("opt", True), ("llama", False)):
        folder = make_model(tmp_path / kind, kind, max_position_embeddings=16)
        architecture = checked_architecture(folder, torch.float32)
        with Embedder(architecture, WeightFiles(folder), CPU, torch.float32) as embed:
            assert embed(tokens(1, 16))[0].shape == (1, 16, 64)
            if learns:
                with pytest.raises(DataError, match="17 tokens.*16 positions"):
                    embed(tokens(1, 17))
            else:
                assert embed(tokens(1, 17))[0].shape == (1, 17, 64)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda layer, hidden, ids: layer(hidden) * 2, "changes the hidden states between"),
        (lambda layer, hidden, ids: layer(hidden, ids), "read more of the tokens"),
        (lambda layer, hidden, ids: layer(hidden, extra={"residual": (hidden,)}), "read more of the tokens"),
        (lambda layer, hidden, ids: layer(hidden, extra=[hidden * 0, {"a": None, "b": 1}]), None),
    ],
)
def test_more_than_hidden_states_between_the_layers_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Any, reason: str | None
) -> None:
    architecture = checked_architecture(make_model(tmp_path), torch.float32)
    body = architecture.body

    def forward(input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden = body.embed_tokens(input_ids)
        for layer in body.layers:
            hidden = run(layer, hidden, input_ids)
        return hidden

    monkeypatch.setattr(body, "forward", forward)
    with Embedder(architecture, WeightFiles(tmp_path), CPU, torch.float32) as embed:
        if reason is None:
            assert len(embed(tokens(1, 8))[1]) == 2
        else:
            with pytest.raises(ModelError, match=reason):
                embed(tokens(1, 8))


# Groups and folds


class Bench:
    """A real model in float64, one of its layers with its inputs, its groups and folds."""

    def __init__(self, model: PreTrainedModel, index: int = 0, length: int = 24, finder: FoldFinder | None = None):
        self.model = model.double().eval()
        self.layer = model.get_submodule(describe(model.config).layers_path)[index]
        self.ids = tokens(2, length)
        seen: dict[str, Any] = {}
        hook = self.layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(args=args, kwargs=kwargs), with_kwargs=True
        )
        self.runs = 0
        with torch.no_grad():
            self.logits = self.model(self.ids, use_cache=False).logits
            hook.remove()
            self.hidden = seen["args"][0]

            def run() -> Tensor:
                self.runs += 1
                output = self.layer(*seen["args"], **seen["kwargs"])
                return output[0] if isinstance(output, tuple) else output

            self.run = run
            with GroupWatcher(self.layer) as watcher:
                run()
            self.runs = 0
            self.folds = (finder or FoldFinder()).find(self.layer, watcher.groups(), run)

    def apply(self, folds: list[Fold]) -> dict[Fold, str]:
        """Fold random scales; what fails is undone and returned."""
        scales = {fold: torch.empty(fold.width, dtype=torch.float64).log_normal_() for fold in folds}
        weights = {name: p.clone() for name, p in self.layer.named_parameters()}

        def apply(fold: Fold) -> None:
            apply_fold(self.layer, fold, scales[fold], torch.float16)

        def reset() -> None:
            self.layer.load_state_dict(weights)

        return verify(folds, self.run, apply, reset, self.hidden)

    def fold(self, *linears: str) -> Fold | None:
        return self.folds[next(group for group in self.folds if group.linears == linears)]


def random_model(kind: str = "llama", other: Any = None, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    made = other or config(kind, **changes)
    model = AutoModelForCausalLM.from_config(made, attn_implementation=attention_of(made))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.3)
                parameter.copy_(parameter.half())
            else:
                parameter.normal_(0.0, 0.1)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_every_group_and_fold_is_found(kind: str) -> None:
    bench = Bench(random_model(kind))
    found = {
        group.linears: fold and (fold.producer, fold.rows if fold.rows is None else fold.rows.tolist(), fold.offset)
        for group, fold in bench.folds.items()
    }
    expected = {
        linears: e and (e[0], e[1] if e[1] is None else list(e[1]), e[2]) for linears, e in EXPECTED[kind].items()
    }
    assert found == expected
    assert list(found) == list(expected)  # in the order of their calls


@pytest.mark.parametrize(
    ("kind", "changes"), [v for v in VARIANTS if "do_layer_norm_before" not in v[1]] + [(k, {}) for k in OTHERS]
)
@torch.no_grad()
def test_folding_all_of_a_models_scales_changes_no_logit(kind: str, changes: dict[str, Any]) -> None:
    model = random_model(kind, OTHERS.get(kind), **changes)
    finder = FoldFinder()
    count = len(model.get_submodule(describe(model.config).layers_path))
    before = Bench(model).logits
    for index in range(count):
        bench = Bench(model, index, finder=finder)
        folds = [fold for fold in bench.folds.values() if fold is not None]
        assert len(folds) >= 2
        assert (bench.runs > 0) == (index == 0)  # found in the first layer, remembered for the others
        weights = {name: p.clone() for name, p in bench.layer.named_parameters()}
        assert bench.apply(folds) == {}
        changed = {name for name, p in bench.layer.named_parameters() if not torch.equal(p, weights[name])}
        assert {f"{name}.weight" for fold in folds for name in (*fold.consumers, fold.producer)} <= changed
    after = Bench(model).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=2e-5)  # RMS norms compute in float32


@pytest.mark.parametrize("kind", ["llama", "phi3", "gemma2"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_query_heads_that_share_a_value_head_share_its_scales(kind: str, kv_heads: int) -> None:
    fold = Bench(random_model(kind, num_key_value_heads=kv_heads)).fold("self_attn.o_proj")
    assert fold is not None
    assert fold.width == 16 * kv_heads
    head, dim = torch.arange(64) // 16, torch.arange(64) % 16
    assert torch.equal(fold.channels, head // (4 // kv_heads) * 16 + dim)
    assert fold.rows is not None
    qkv = 64 + 2 * fold.width
    assert fold.rows.tolist() == list(range(qkv - fold.width, qkv) if kind == "phi3" else range(fold.width))


@pytest.mark.parametrize(
    ("changes", "found"), [({"new_decoder_architecture": True, "num_kv_heads": 2}, 32), ({"multi_query": True}, 16)]
)
def test_values_at_the_end_of_every_group_of_heads(changes: dict[str, Any], found: int) -> None:
    other = FalconConfig(vocab_size=96, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, **changes)
    bench = Bench(random_model(other=other))
    fold = bench.fold("self_attention.dense")
    assert fold is not None
    assert fold.width == found
    assert fold.rows is not None
    rows = bench.layer.self_attention.query_key_value.out_features
    blocks = found // 16
    assert fold.rows.tolist() == [r for r in range(rows) if r % (rows // blocks) >= rows // blocks - 16]


@pytest.mark.parametrize(("activation", "passes"), [("relu", True), ("gelu", False), ("silu", False), ("relu2", False)])
def test_only_activations_that_pass_a_factor_on_do(activation: str, passes: bool) -> None:
    bench = Bench(random_model("opt", activation_function=activation))
    assert (bench.fold("fc2") is not None) == passes


def test_units_that_never_fire_do_not_hide_a_fold() -> None:
    model = random_model("opt")
    with torch.no_grad():
        model.model.decoder.layers[0].fc1.bias[::3] = -1e4
    assert Bench(model).fold("fc2") is not None


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_few_tokens_are_enough(length: int) -> None:
    for kind in ("opt", "llama", "gpt_neox"):
        folds = Bench(random_model(kind), length=length).folds.values()
        assert [fold is None for fold in folds] == [e is None for e in EXPECTED[kind].values()]


@torch.no_grad()
def test_a_norm_that_also_feeds_the_residual_is_found_out_by_verify() -> None:
    """OPT-350m normalises after adding, so its norms' outputs go two ways."""
    bench = Bench(random_model("opt", do_layer_norm_before=False))
    fold = bench.fold("fc1")
    assert fold is not None
    failed = bench.apply([fold])
    assert "output changed" in failed[fold]
    assert bench.fold(*QKV) is None


def test_finding_folds_leaves_no_trace() -> None:
    model = random_model("phi3")
    before = {name: p.clone() for name, p in model.double().named_parameters()}
    bench = Bench(model)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert bench.folds.keys() == {InputGroup(k, e[0] if e[1] is None else None) for k, e in EXPECTED["phi3"].items()}
