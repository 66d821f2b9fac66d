"""Every recipe and scheme that is offered: it runs, comes back from disk as it should, and stays near the model."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from backend.engines.llm_compressor import check_finite
from backend.errors import CheckpointError, ConfigError, EngineError
from backend.paths import PROJECT
from backend.schema.llm_tables import RECIPES, SCHEMES
from backend.schema.llmcompressor import LLMCompressorSettings
from tests.engines.llm_tiny import (
    CHAT_TEMPLATE,
    compress,
    logits,
    make_model,
    mean_kl,
    own_logits,
    random_tokens,
    scramble,
    write_tokens,
)

PAIRS = [(recipe, scheme) for recipe, facts in RECIPES.items() for scheme in facts.schemes]
FORMATS = {
    "W8A8": "int-quantized", "FP8_DYNAMIC": "float-quantized", "FP8_BLOCK": "float-quantized",
    "NVFP4": "nvfp4-pack-quantized", "NVFP4A16": "nvfp4-pack-quantized", "MXFP4": "mxfp4-pack-quantized",
}  # fmt: skip
MEASURED = ("GPTQ", "AWQ", "AWQ+GPTQ", "SmoothQuant+GPTQ", "SparseGPT", "SparseGPT+RTN")
LINEAR = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model = make_model(folder / "model")
    return {"model": model, "tokens": write_tokens(folder / "tokens.safetensors", random_tokens(8)), "folder": folder}


@pytest.fixture(scope="module")
def base(tiny):
    return logits(tiny["model"])


@pytest.fixture(scope="module")
def garbage(tiny, base):
    """KL of a checkpoint that comes back wrong."""
    return mean_kl(base, logits(scramble(tiny["model"], tiny["folder"] / "scrambled")))


def run(tiny, out, section, **more):
    section = {"AUTOROUND_ITERS": 2, **section}
    return compress(more.pop("model", tiny["model"]), more.pop("tokens", tiny["tokens"]), out, section, **more)


def stored(folder):
    return load_file(folder / "model.safetensors")


def limit(recipe, scheme):
    """The largest KL to the base model: about 1.5 times what was measured; wrong checkpoints are above 1."""
    if "Sparse" in recipe or recipe == "Wanda":
        return 0.5
    fine = dict.fromkeys(("W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NONE"), 0.015)
    return {**fine, "W2A16": 0.9, "W3A16": 0.35, "MXFP4": 0.16}.get(scheme, 0.12)


@pytest.mark.parametrize(("recipe", "scheme"), PAIRS)
def test_an_offered_pair_comes_back_right(tiny, base, garbage, tmp_path, recipe, scheme):
    done = run(tiny, tmp_path, {"RECIPE": recipe, "SCHEME": scheme})
    folder, made = done["folder"], done["made"]
    tensors = stored(folder)
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})

    as_transformers_reads_it = logits(folder)
    kl = mean_kl(base, as_transformers_reads_it)
    assert 0 < kl < limit(recipe, scheme) < garbage
    assert mean_kl(as_transformers_reads_it, own_logits(folder)) < 0.002

    assert torch.equal(tensors["lm_head.weight"], stored(tiny["model"])["lm_head.weight"]) or "Spin" in recipe
    if scheme == "NONE":
        assert f"{LINEAR}.weight" in tensors
        assert config.get("format") == ("dense" if recipe == "KVCache" else None)
    else:
        assert config["quant_method"] == "compressed-tensors"
        assert config["format"] == FORMATS.get(scheme, "pack-quantized")
        assert config["ignore"] == ["lm_head"]
        weights = config["config_groups"]["group_0"]["weights"]
        assert weights["num_bits"] == SCHEMES[scheme].bits
        assert weights["symmetric"] is SCHEMES[scheme].symmetric
        if SCHEMES[scheme].weight_only:
            assert weights["group_size"] == 128
            assert tensors[f"{LINEAR}.weight_packed"].dtype == torch.int32
    if recipe == "KVCache":
        assert config["kv_cache_scheme"]["num_bits"] == 8
        assert made["skipped"] == {}
    else:
        assert made["skipped"] == {"lm_head": "listed in IGNORE"}
    if recipe in MEASURED:
        assert [row["layer"] for row in made["layers"]] == ["model.layers.0", "model.layers.1"]
        assert all(0 < row["error"] < 1 for row in made["layers"])
    else:
        assert made["layers"] == []
    assert (folder / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert (folder / "tokenizer_config.json").read_bytes() == (tiny["model"] / "tokenizer_config.json").read_bytes()


@pytest.mark.parametrize("recipe", ["SparseGPT", "Wanda", "SparseGPT+RTN"])
def test_pruned_weights_are_zero_after_reading_and_the_head_is_whole(tiny, tmp_path, recipe):
    from transformers import AutoModelForCausalLM

    folder = run(tiny, tmp_path, {"RECIPE": recipe})["folder"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model(random_tokens(1, 4))  # packed weights are unpacked by the first forward pass
    zeros = (model.get_submodule(LINEAR).weight == 0).view(-1, 4).sum(1)  # (groups of four,)
    assert bool((zeros >= 2).all())
    assert float((model.lm_head.weight == 0).float().mean()) < 0.01


def test_unstructured_pruning_reaches_its_part(tiny, tmp_path):
    weight = stored(run(tiny, tmp_path, {"RECIPE": "Wanda", "MASK": "unstructured", "SPARSITY": 0.3})["folder"])
    assert float((weight[f"{LINEAR}.weight"] == 0).float().mean()) == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize(
    ("section", "strategy", "size"),
    [
        ({"GROUP_SIZE": 32}, "group", 32),
        ({"GROUP_SIZE": -1, "SCHEME": "W4A16_ASYM"}, "channel", None),
        ({"GROUP_SIZE": 64, "RECIPE": "AWQ"}, "group", 64),
        ({"GROUP_SIZE": 64, "RECIPE": "RTN", "SCHEME": "W3A16"}, "group", 64),
    ],
)
def test_a_group_size_of_ones_own(tiny, base, tmp_path, section, strategy, size):
    folder = run(tiny, tmp_path, section)["folder"]
    weights = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert weights["weights"]["strategy"] == strategy
    assert weights["weights"]["group_size"] == size
    columns = 1 if size is None else 128 // size
    assert stored(folder)[f"{LINEAR}.weight_scale"].shape == (256, columns)
    assert mean_kl(base, logits(folder)) < limit("GPTQ", section.get("SCHEME", "W4A16"))


@pytest.mark.parametrize("section", [{}, {"RECIPE": "RTN", "SCHEME": "FP8_DYNAMIC"}])
def test_an_8_bit_cache_beside_quantized_weights(tiny, base, tmp_path, section):
    folder = run(tiny, tmp_path, {**section, "KV_CACHE_FP8": True})["folder"]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["type"] == "float"
    assert "model.layers.0.self_attn.k_scale" in stored(folder)
    assert mean_kl(base, logits(folder)) < 0.12


def test_float16_is_stored_as_float16(tiny, base, tmp_path):
    folder = run(tiny, tmp_path, {"dtype": "float16"})["folder"]
    assert stored(folder)["model.norm.weight"].dtype == torch.float16
    assert mean_kl(base, logits(folder)) < 0.12


def test_a_hidden_size_that_is_no_power_of_two_is_rotated_too(tmp_path):
    model = make_model(tmp_path / "model", hidden_size=384, intermediate_size=384, num_attention_heads=4, head_dim=96)
    tokens = write_tokens(tmp_path / "t.safetensors", random_tokens(2))
    folders = [compress(model, tokens, tmp_path, {"RECIPE": recipe})["folder"] for recipe in ("SpinQuant+RTN", "RTN")]
    rotated, plain = (mean_kl(logits(model), logits(folder)) for folder in folders)
    assert 0 < rotated < 1.5 * plain


def test_tied_embeddings_stay_tied(tmp_path):
    model = make_model(tmp_path / "model", tie_word_embeddings=True)
    tokens = write_tokens(tmp_path / "t.safetensors", random_tokens(4))
    folder = compress(model, tokens, tmp_path / "out", {})["folder"]
    assert "lm_head.weight" not in stored(folder)
    assert mean_kl(logits(model), logits(folder)) < 0.12


def test_the_same_seed_gives_the_same_files(tiny, tmp_path):
    first, again = (run(tiny, tmp_path / name, {}, seed=3)["folder"] for name in ("a", "b"))
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_every_sequence_counts_and_padding_does_not(tiny, tmp_path):
    tokens, lengths = random_tokens(8), torch.tensor([32, 5, 17, 32, 9, 30, 1, 32])
    padded = tokens * (torch.arange(32) < lengths[:, None])
    other = torch.where(torch.arange(32) < lengths[:, None], tokens, torch.tensor(9))
    files = [write_tokens(tmp_path / f"{i}.safetensors", t, lengths) for i, t in enumerate((padded, other))]
    one, two = (run(tiny, tmp_path / file.stem, {}, tokens=file) for file in files)
    assert one["tokens"] == int(lengths.sum())
    assert (one["folder"] / "model.safetensors").read_bytes() == (two["folder"] / "model.safetensors").read_bytes()
    assert one["made"]["layers"] != run(tiny, tmp_path / "full", {})["made"]["layers"]


def test_sequences_of_different_length_go_through_awq(tiny, base, tmp_path):
    tokens = write_tokens(tmp_path / "t.safetensors", random_tokens(4), torch.tensor([32, 5, 17, 32]))
    folder = run(tiny, tmp_path, {"RECIPE": "AWQ"}, tokens=tokens)["folder"]
    assert mean_kl(base, logits(folder)) < 0.12


def test_autoround_gets_sequences_of_one_length(tiny, tmp_path):
    """It would use the positions of the first sequence for all of them, cut off where that one ends."""
    ragged = write_tokens(tmp_path / "r.safetensors", random_tokens(4), torch.tensor([5, 32, 17, 16]))
    joined = torch.cat([row[:n] for row, n in zip(random_tokens(4), (5, 32, 17, 16), strict=True)])
    even = write_tokens(tmp_path / "e.safetensors", joined[:64].view(2, 32).clone())
    section = {"RECIPE": "AutoRound", "AUTOROUND_ITERS": 1}
    one, two = (run(tiny, tmp_path / name, section, tokens=file) for name, file in (("a", ragged), ("b", even)))
    assert (one["folder"] / "model.safetensors").read_bytes() == (two["folder"] / "model.safetensors").read_bytes()
    assert one["tokens"] == 64
    (note,) = [note for note in one["made"]["notes"] if "joined" in note]
    assert "4 sequences were joined and cut into 2 of 32 tokens" in note
    assert not [note for note in two["made"]["notes"] if "joined" in note]


def test_progress_tells_layers_errors_and_steps(tiny, tmp_path):
    done = run(tiny, tmp_path, {})
    layers = [event for event in done["events"] if "error" in event]
    assert [event["layer"] for event in layers] == ["model.layers.0", "model.layers.1"]
    assert all(event["unit"] == "relative output error" for event in layers)
    assert all(0 < event["error"] < event["rtn_error"] for event in layers)  # GPTQ beats rounding on its own text
    assert {event["configuration"] for event in done["events"]} == {"gptq-w4a16-g128"}
    stages = [event["stage"] for event in done["events"]]
    assert stages == sorted(stages, key=["calibrate", "quantize", "save"].index)
    steps = [(event["step"], event["total"]) for event in done["events"] if "step" in event]
    assert steps == sorted(steps)
    assert steps[-1] == (3, 3)
    assert all(set(done["timings"][stage]) >= {"wall_s", "cpu_s"} for stage in ("calibrate", "quantize", "save"))


def test_the_reported_errors_are_those_of_the_stored_weights(tiny, tmp_path):
    """Recomputed for layer 0 in float64 from the weights that transformers reads and the inputs they get."""
    from transformers import AutoModelForCausalLM

    row = (done := run(tiny, tmp_path, {"DAMPENING_FRAC": 1e-6}))["made"]["layers"][0]
    rounded = run(tiny, tmp_path, {"RECIPE": "RTN"})
    folders = [tiny["model"], done["folder"], rounded["folder"]]
    base, *others = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for folder in folders]
    inputs = {}
    for name, module in base.model.layers[0].named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, given, name=name: inputs.update({name: given[0]}))
    with torch.no_grad():
        base(load_file(tiny["tokens"])["tokens"])
        for model in others:
            model(random_tokens(1, 4))  # packed weights are unpacked by the first forward pass
    for model, reported in zip(others, (row["error"], row["rtn_error"]), strict=True):
        wrong = right = 0.0
        for name, given in inputs.items():
            w, q = (m.model.layers[0].get_submodule(name).weight.detach().double() for m in (base, model))
            x = given.double().flatten(0, 1)  # (tokens, in)
            wrong += float((x @ (w - q).T).square().sum())
            right += float((x @ w.T).square().sum())
        assert reported == pytest.approx(wrong / right, rel=0.05)


def test_two_passes_count_as_one_progress(tiny, tmp_path):
    done = run(tiny, tmp_path, {"RECIPE": "AWQ+GPTQ"})
    steps = [(event["step"], event["total"]) for event in done["events"] if "step" in event]
    assert steps == sorted(steps)
    assert steps[-1] == (6, 6)


def indefinite(hessian):
    """Two inputs correlated more than fully, which no damping of one percent repairs."""
    hessian[0, 1] = hessian[1, 0] = 2 * (hessian[0, 0] * hessian[1, 1]).sqrt()


def test_a_hessian_that_cannot_be_inverted_is_told(tiny, tmp_path, monkeypatch):
    """The second Linear's Hessian is made indefinite, as rounding does to the large ones of real models."""
    from llmcompressor.modifiers.gptq import base as gptq

    prepare, count = gptq.prepare_batch, iter(range(1000))

    def spoiled(*given):
        weights, hessians, *rest = prepare(*given)
        if next(count) == 1:
            indefinite(hessians[0])
        return weights, hessians, *rest

    monkeypatch.setattr(gptq, "prepare_batch", spoiled)
    done = run(tiny, tmp_path, {})
    (note,) = [note for note in done["made"]["notes"] if "Hessian" in note]
    assert note.startswith("model.layers.0.")
    assert "the Hessian could not be inverted" in note
    assert done["made"]["layers"][0]["notes"] == [note]
    assert [event["notes"] for event in done["events"] if event.get("layer") == "model.layers.0"] == [[note]]


def test_a_pruning_hessian_that_cannot_be_inverted_is_told(tiny, tmp_path, monkeypatch):
    from llmcompressor.modifiers.pruning.sparsegpt import base as sparsegpt

    solve, count = sparsegpt.sparsify_weight, iter(range(1000))

    def spoiled(**given):
        if next(count) == 1:
            indefinite(given["hessians_dict"][given["module"]])
        return solve(**given)

    monkeypatch.setattr(sparsegpt, "sparsify_weight", spoiled)
    made = run(tiny, tmp_path, {"RECIPE": "SparseGPT"})["made"]
    assert [note for note in made["notes"] if "k_proj: the Hessian" in note] == made["layers"][0]["notes"]
    assert len(made["layers"][0]["notes"]) == 1


def spoil(model, folder, name, value):
    from safetensors.torch import save_file

    folder.mkdir()
    for path in model.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors[name][0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_nan_in_the_activations_names_the_linear(tiny, tmp_path):
    bad = spoil(tiny["model"], tmp_path / "bad", "model.layers.1.input_layernorm.weight", float("nan"))
    with pytest.raises(EngineError, match=r"model\.layers\.1\.self_attn\.\w_proj: its calibration activations"):
        run(tiny, tmp_path / "out", {}, model=bad)


def test_nan_in_the_result_names_the_tensor_and_is_no_success(tiny, tmp_path):
    bad = spoil(tiny["model"], tmp_path / "bad", f"{LINEAR}.weight", float("nan"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.up_proj\.weight holds NaN"):
        run(tiny, tmp_path / "out", {"RECIPE": "RTN", "SCHEME": "FP8_DYNAMIC"}, model=bad)


def test_infinity_in_8_bit_floats_is_found(tmp_path):
    from safetensors.torch import save_file

    tensor = torch.ones(4).to(torch.float8_e4m3fn)
    save_file({"fine": tensor}, tmp_path / "model.safetensors")
    check_finite(tmp_path)
    tensor.view(torch.uint8)[2] = 0x7F  # NaN
    save_file({"broken": tensor}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="broken holds NaN"):
        check_finite(tmp_path)


def test_a_failure_of_the_package_says_where(tiny, tmp_path, monkeypatch):
    from llmcompressor.modifiers.gptq import base as gptq

    def broken(*_):
        raise RuntimeError("out of registers")

    monkeypatch.setattr(gptq, "prepare_batch", broken)
    with pytest.raises(EngineError, match=r"stopped at model\.layers\.0: RuntimeError: out of registers"):
        run(tiny, tmp_path, {})


def test_the_taps_are_taken_out_again(tiny, tmp_path):
    from llmcompressor.modifiers.gptq import base as gptq
    from llmcompressor.pipelines.sequential import pipeline

    before = gptq.quantize_weight, pipeline.tqdm
    run(tiny, tmp_path, {})
    assert (gptq.quantize_weight, pipeline.tqdm) == before


def test_what_an_earlier_attempt_left_is_replaced(tiny, tmp_path):
    (tmp_path / "gptq-w4a16-g128").mkdir()
    (tmp_path / "gptq-w4a16-g128" / "model-00001-of-00002.safetensors").write_bytes(b"half")
    assert sorted(p.name for p in run(tiny, tmp_path, {})["folder"].glob("*.safetensors")) == ["model.safetensors"]


def test_several_configurations_are_refused(tiny, tmp_path):
    from backend.engines.llm_compressor import quantize

    request = {"model_dir": str(tiny["model"]), "out_dir": str(tmp_path), "configurations": [{}, {}]}
    with pytest.raises(ConfigError, match="found 2 configurations"):
        quantize(request, None)


def test_as_a_program_its_output_is_events_alone(tiny, tmp_path):
    """The package logs to standard output; a single such line would break the reader of the events."""
    settings = LLMCompressorSettings(RECIPE="RTN", SCHEME="FP8_DYNAMIC")
    request = {
        "model_dir": str(tiny["model"]), "tokens_file": str(tiny["tokens"]), "out_dir": str(tmp_path / "out"),
        "device": "cpu", "seed": 0,
        "configurations": [{"name": "fp8", "label": "FP8", "settings": settings.model_dump()}],
    }  # fmt: skip
    (tmp_path / "request.json").write_text(json.dumps(request))
    finished = subprocess.run(
        [sys.executable, "-m", "backend.engines.llm_compressor", tmp_path / "request.json", tmp_path / "result.json"],
        cwd=PROJECT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    events = [json.loads(line) for line in finished.stdout.splitlines()]
    assert [event["stage"] for event in events][:: len(events) - 1] == ["calibrate", "save"]
    assert "Compression lifecycle finalized" in finished.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert [entry["name"] for entry in result["results"]] == ["fp8"]
    assert (tmp_path / "out" / "fp8" / "config.json").is_file()
