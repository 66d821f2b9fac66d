"""TensorRTLLM's section: the guide's file to the letter, the original's keys, every refusal at its key."""

import pytest

from backend.engines.modelopt_plan import modelopt_requests
from backend.errors import ConfigErrors
from backend.schema import TensorRTLLMSettings, describe, parse_yaml
from backend.tensorrt_llm.methods import ENGINE, METHODS, PYTORCH
from tests.conftest import EXAMPLES, demo_text

GUIDE = (EXAMPLES / "tensorrtllm_guide.yaml").read_text(encoding="utf-8")
# The keys of the original system's example file.
ORIGINAL = {
    "to_quantize": True, "dtype": "float16", "quant_method": "int4_awq", "smoothquant": 0.5, "calib_size": 32,
    "max_input_len": 2048, "pp_size": 1, "per_channel": False, "per_token": False, "int8_kv_cache": False,
    "per_group": False, "load_by_shard": False, "hidden_act": "silu", "rotary_base": 10000.0, "max_seq_length": 2048,
    "batch_size": 1, "awq_block_size": 128, "max_batch_size": 1, "max_output_len": 1024, "max_beam_width": 1,
    "max_num_tokens": None, "max_prompt_embedding_table_size": 0, "use_fused_mlp": False,
}  # fmt: skip


def job(section, **more):
    return parse_yaml(demo_text(ALGORITHM="TensorRTLLM", llm={"TensorRTLLM": section}, CALIBRATION=None, **more))


def settings_of(section, **more):
    return job(section, **more).config.algorithm_settings


def problem_of(section, **more):
    with pytest.raises(ConfigErrors) as caught:
        settings_of(section, **more)
    (error,) = caught.value.errors
    return error.key, error.detail


def test_the_guides_file_is_valid_and_comes_back_byte_for_byte():
    document = parse_yaml(GUIDE)
    config, settings = document.config, document.config.algorithm_settings
    assert "...other params" in GUIDE and document.dump() == GUIDE and document.warnings == []
    assert (settings.methods, settings.mode("int4_awq"), settings.builds_engine) == (("int4_awq",), PYTORCH, False)
    assert (config.calibration.SAMPLES, config.calibration.SEQUENCE_LENGTH) == (32, 2048)
    # The guide's container has the user's folder at /user_data; here it is that of the home.
    assert (config.USER_FOLDER, config.CACHE_PATH) == ("user_data/example", "user_data/example/.cache")


def test_a_changed_guide_keeps_its_placeholder():
    document = parse_yaml(GUIDE)
    document.set(("llm", "TensorRTLLM", "quant_method"), "fp8")
    again = parse_yaml(document.dump())
    assert "\n    ...other params\n" in document.dump() and again.config.algorithm_settings.quant_method == "fp8"
    assert again.values["llm"]["TensorRTLLM"]["calib_size"] == 32


@pytest.mark.parametrize("folder", ["/user_data/../etc", "/user_database", "/etc", "/"])
def test_no_other_absolute_folder_is_taken(folder):
    with pytest.raises(ConfigErrors, match="inside the home folder"):
        _ = parse_yaml(GUIDE.replace('"/user_data/example"', f'"{folder}"')).config


def test_every_key_of_the_original_is_known_and_its_defaults_are_ours_or_explained():
    settings = settings_of(ORIGINAL)
    specs = {spec.key: spec for spec in describe(TensorRTLLMSettings)}
    assert set(ORIGINAL) <= set(specs) and not job(ORIGINAL).warnings
    differ = {key for key, value in ORIGINAL.items() if value != specs[key].default}
    assert differ == {"max_input_len"}  # the original's own code has 1024
    assert settings.max_input_len == 2048
    for key in ("pp_size", "rotary_base", "use_fused_mlp", "kv_cache_dtype", "load_by_shard"):
        assert specs[key].ignored and len(specs[key].help) > 20


def test_the_fields_of_the_form_are_all_in_a_group():
    groups = {(group.section, group.ignored) for group in TensorRTLLMSettings.GROUPS}
    assert {(spec.section, spec.ignored) for spec in describe(TensorRTLLMSettings)} == groups


@pytest.mark.parametrize(("method", "mode"), [("int4_awq", PYTORCH), ("fp8", PYTORCH), ("smoothquant", ENGINE),
                                              ("int8", ENGINE), ("w4a8_awq", PYTORCH)])  # fmt: skip
def test_where_each_method_runs(method, mode):
    settings = settings_of({"quant_method": method})
    assert settings.mode(method) == mode and settings.builds_engine == (mode == ENGINE)
    (request,) = modelopt_requests(settings)
    grouped = method in ("int4_awq", "w4a8_awq")
    assert (request["mode"], request["group_size"], request["name"]) == (mode, 128 if grouped else None, method)
    assert request["smoothquant"] == (0.5 if method == "smoothquant" else None)


def test_several_methods_and_none():
    several = settings_of({"quant_method": ["int4_awq", "int8"], "awq_block_size": 64})
    names = [(one["name"], one["mode"], one["group_size"]) for one in modelopt_requests(several)]
    assert names == [("int4_awq", PYTORCH, 64), ("int8", ENGINE, None)]
    plain = settings_of({"to_quantize": False, "dtype": "bfloat16"})
    assert [(one["name"], one["method"]) for one in modelopt_requests(plain)] == [("bfloat16", None)]
    assert settings_of({"to_quantize": False, "BACKEND": "tensorrt"}).builds_engine


@pytest.mark.parametrize(
    ("section", "key", "says"),
    [
        ({"calib_size": 0}, "calib_size", "must be at least 1"),
        ({"quant_method": "int3"}, "quant_method", "'int4_awq', 'fp8', 'smoothquant'"),
        ({"quant_method": []}, "quant_method", "name at least one"),
        ({"quant_method": "int8", "BACKEND": "pytorch"}, "BACKEND", "runs only in an engine of TensorRT-LLM 1.2.1"),
        ({"quant_method": "nvfp4", "BACKEND": "tensorrt", "dtype": "bfloat16"}, "BACKEND", "the pytorch backend"),
        ({"quant_method": "nvfp4"}, "dtype", "compute in bfloat16"),
        ({"awq_block_size": 32}, "awq_block_size", "allowed: 128 or 64"),
        ({"to_quantize": False, "quant_method": ["fp8", "int8"]}, "quant_method", "one 16-bit export"),
        ({"dtype": "float32"}, "dtype", "'float16' or 'bfloat16'"),
        ({"smoothquant": 1.5}, "smoothquant", "must be at most 1"),
        ({"AWQ_ALPHA_STEP": 0.0}, "AWQ_ALPHA_STEP", "must be at least 0.01"),
        ({"max_num_tokens": 0}, "max_num_tokens", "must be at least 1"),
        ({"KV_CACHE_FRACTION": 1.0}, "KV_CACHE_FRACTION", "must be at most 0.95"),
    ],
)
def test_what_is_refused_and_where(section, key, says):
    found, detail = problem_of(section)
    assert found == f"llm.TensorRTLLM.{key}" and says in detail


def test_methods_say_what_they_need():
    assert METHODS["int4_awq"].capability == (8, 0) and METHODS["fp8"].capability == (8, 9)
    assert METHODS["nvfp4"].needs_cuda and not any(METHODS[m].needs_cuda for m in METHODS if m != "nvfp4")
    assert [m.name for m in METHODS.values() if m.modes == (ENGINE,)] == ["smoothquant", "int8"]
