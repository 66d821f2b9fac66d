"""What of a model does not go with a TensorRT-LLM job is refused before it starts, each at its key."""

import json

import pytest
import transformers

from backend.engines.configurations import configurations
from backend.engines.trtllm_plan import fields_of
from backend.errors import ConfigErrors
from backend.formats.headers import TensorInfo
from backend.jobs.trtllm_checks import check_device, run_notes
from backend.schema import parse_yaml
from backend.sources.quick_check import QuickFacts
from backend.tensorrt_llm.fit import check_fit
from backend.tensorrt_llm.models import DECODER_TYPES, PYTORCH_MODELS
from tests.conftest import demo_text

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "num_attention_heads": 6, "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}  # fmt: skip


def facts(width=384, **config):
    """A model with one Linear of that many inputs."""
    name = "model.layers.0.mlp.down_proj"
    info = TensorInfo(f"{name}.weight", "BF16", (384, width), "model.safetensors", 768 * width)
    return QuickFacts({**LLAMA, **config}, [info], {name: (384, width)})


def job(section=None, gpus="0", **more):
    llm = {"AutoAWQ": None, "TensorRTLLM": section or {}}
    values = {"ALGORITHM": "TensorRTLLM", "CALIBRATION": None, "CUDA_ID": gpus, **more}
    return parse_yaml(demo_text(llm=llm, **values)).config


def problems(section=None, gpus="0", width=384, **config):
    with pytest.raises(ConfigErrors) as caught:
        check_fit(facts(width, **config), job(section, gpus))
    return [(error.key, error.detail) for error in caught.value.errors]


def test_a_model_that_goes_with_everything():
    every = ["int4_awq", "fp8", "smoothquant", "int8", "w4a8_awq"]
    check_fit(facts(), job({"quant_method": every, "max_input_len": 512, "max_output_len": 512}))
    check_fit(facts(width=192), job({"quant_method": "int8"}))  # it has no blocks
    check_fit(facts(width=192), job({"quant_method": "int4_awq", "awq_block_size": 64}))


@pytest.mark.parametrize(
    ("section", "gpus", "model", "key", "says"),
    [
        ({}, "0", {"architectures": ["OPTForCausalLM"]}, "MODEL", "found a OPTForCausalLM; TensorRT-LLM's PyTorch"),
        ({}, "0", {"architectures": ["Phi3ForCausalLM"]}, "MODEL", "BACKEND tensorrt has this one"),
        ({"quant_method": "int8"}, "0", {"architectures": ["Qwen3ForCausalLM"]}, "MODEL", "engines of TensorRT-"),
        ({}, "0", {"architectures": None}, "MODEL", "model of no named architecture"),
        ({}, "0,1,2,3", {}, "CUDA_ID", "found 4 GPUs"),
        ({}, "0,1,2", {}, "CUDA_ID", "num_key_value_heads 2; name 1 or 2 GPUs"),
        ({}, "0", {"width": 192}, "llm.TensorRTLLM.awq_block_size", "does not divide the 192 inputs"),
        ({"BACKEND": "tensorrt"}, "0,1", {}, "llm.TensorRTLLM.awq_block_size", "the 384 / 2 GPUs inputs"),
        ({"quant_method": "int8", "max_input_len": 1000, "max_output_len": 100}, "0", {},
         "llm.TensorRTLLM.max_input_len", "together 1100 tokens; the model has 1024 positions"),
    ],
)  # fmt: skip
def test_what_is_refused_and_where(section, gpus, model, key, says):
    ((found, detail),) = problems(section, gpus, **model)
    assert found == key and says in detail


def test_positions_that_an_engine_would_compute_otherwise():
    yarn = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0}}
    ((key, detail),) = problems({"quant_method": "int8"}, **yarn)
    assert key == "MODEL" and "'yarn'" in detail and "BACKEND pytorch" in detail
    check_fit(facts(**yarn), job({"quant_method": "fp8"}))


def test_a_block_size_that_fits_is_named_or_a_method_without_blocks():
    assert problems(width=192)[0][1].endswith("set it to 64")
    assert problems(width=96)[0][1].endswith("choose quant_method fp8 or int8, which have no blocks")


def test_lengths_that_nobody_chose_give_way_to_the_models_positions():
    config = job({"quant_method": "int8"})
    fields = fields_of(config, configurations(config)[0], LLAMA, has_text=True)
    assert (fields["max_input_len"], fields["max_output_len"], fields["perplexity"]) == (512, 512, True)
    fields = fields_of(config, configurations(config)[0], {**LLAMA, "max_position_embeddings": 512}, has_text=True)
    assert (fields["max_input_len"], fields["perplexity"]) == (256, False)  # windows of 512 tokens do not fit
    fields = fields_of(job(gpus="0,1"), configurations(config)[0], {}, has_text=False)
    assert (fields["tp_size"], fields["max_input_len"], fields["perplexity"]) == (2, 1024, False)


def test_nvfp4_needs_a_gpu_to_be_made():
    config = job({"quant_method": ["fp8", "nvfp4"], "dtype": "bfloat16"})
    with pytest.raises(ConfigErrors, match="found nvfp4, which needs an NVIDIA GPU to quantize too"):
        check_device(config, "cpu")
    check_device(config, "cuda:0")
    check_device(job({"quant_method": "fp8"}), "cpu")


def test_what_a_machine_will_not_do_is_told_before_the_start(home, tmp_path, monkeypatch):
    (note,) = run_notes(job(), facts(), home, tmp_path, "cpu")
    assert "there is none here" in note
    assert run_notes(job(BENCHMARK={"ENABLED": False}), facts(), home, tmp_path, "cpu") == []
    gpus = tmp_path / "gpus.json"
    gpus.write_text(json.dumps([{"uuid": "GPU-1", "name": "T4", "capability": [7, 5]}]))
    monkeypatch.setenv("QUANTDECK_FAKE_GPUS", str(gpus))
    config = job({"quant_method": ["int4_awq", "fp8"]})
    told = run_notes(config, facts(), home, tmp_path, "cuda:0")
    assert any("compute capability 7.5" in note and "fp8 needs 8.9" in note for note in told)
    assert all("hands over the commands" in note for note in told)


def test_architectures_are_those_of_transformers_and_decoder_types_those_of_modelopt():
    from modelopt.torch.export.model_utils import get_model_type

    for name in {*DECODER_TYPES, *PYTORCH_MODELS}:
        assert hasattr(transformers, name), name
    for name, decoder in DECODER_TYPES.items():
        model = object.__new__(getattr(transformers, name))
        assert get_model_type(model) == decoder, name
