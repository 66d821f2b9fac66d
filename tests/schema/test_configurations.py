"""From a job file to what the engines are asked for: one configuration for each combination of the lists."""

import json
import re
import sys
from pathlib import Path

import pytest

from backend.engines.configurations import configurations
from backend.engines.registry import ENGINES, NATIVE, OF_ALGORITHM, engine_for
from backend.errors import EngineError
from backend.quantize.recipe import Scheme
from backend.schema import ALGORITHMS, describe, parse_yaml
from backend.schema.llmcompressor import RECIPES
from tests.conftest import EXAMPLES, demo_text


def config_of(algorithm, section):
    return parse_yaml(demo_text(ALGORITHM=algorithm, llm={algorithm: section})).config


def planned(algorithm, section):
    return configurations(config_of(algorithm, section))


def test_the_guide_makes_one_result_in_its_own_format(guide_text):
    (one,) = configurations(parse_yaml(guide_text).config)
    assert (one.name, one.label, one.engine) == ("awq-w4-g128", "AWQ 4 bit, groups of 128", "native")
    assert (one.request["layout"], one.request["dtype"]) == ("autoawq-gemv", "float16")
    assert one.recipe.scheme == Scheme("AWQ", 4, 128, symmetric=False) and one.recipe.keep == ("lm_head",)


def test_the_list_example_makes_four_results_in_the_files_order():
    found = configurations(parse_yaml((EXAMPLES / "native_demo.yaml").read_text(encoding="utf-8")).config)
    assert [one.name for one in found] == ["awq-w4-g128", "awq-w3-g128", "gptq-w4-g128", "gptq-w3-g128"]
    assert {one.request["layout"] for one in found} == {"compressed-tensors"}


def test_names_are_unique_and_fit_for_folders_and_requests_are_json():
    cases = [
        ("AutoAWQ", {"W_BIT": [2, 3, 4, 8], "Q_GROUP_SIZE": [32, 64, 128], "ZERO_POINT": False}),
        ("Native", {"METHOD": ["RTN", "AWQ", "GPTQ", "AWQ+GPTQ"], "W_BIT": [8, 2], "Q_GROUP_SIZE": [-1, 64]}),
        *(("LLMCompressor", {"RECIPE": recipe, "KV_CACHE_FP8": recipe == "GPTQ"}) for recipe in RECIPES),
    ]
    for algorithm, section in cases:
        found = planned(algorithm, section)
        names = [one.name for one in found]
        assert len(set(names)) == len(names) and len({one.label for one in found}) == len(names)
        for one in found:
            assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", one.name), one.name
            assert json.loads(json.dumps(one.request))["name"] == one.name and one.label == one.request["label"]


def test_a_recipe_survives_its_way_as_json():
    overrides = [{"PATTERN": "*.down_proj", "W_BIT": 8}, {"PATTERN": "*.o_proj", "KEEP": True}]
    (one,) = planned("Native", {"OVERRIDES": overrides, "KEEP": ["lm_head", "v_proj"], "MISFIT": "fit", "DAMP": 0.1})
    again = type(one)(one.name, one.label, one.engine, json.loads(json.dumps(one.request)))
    assert again.recipe == one.recipe
    assert (one.recipe.damp, one.recipe.correct, one.recipe.refine) == (0.1, True, 2)
    (other,) = planned("Native", {"CORRECT": False, "REFINE": 0})
    assert (other.recipe.correct, other.recipe.refine) == (False, 0)
    assert one.recipe.scheme_for("model.layers.0.mlp.down_proj", 128) == Scheme("GPTQ", 8, 128)
    assert "to be kept" in one.recipe.scheme_for("model.layers.0.self_attn.o_proj", 128)
    assert "to be kept" in one.recipe.scheme_for("model.layers.0.self_attn.v_proj", 128)
    assert one.recipe.scheme_for("model.layers.0.self_attn.q_proj", 96) == Scheme("GPTQ", 4, 32)


def test_an_exception_takes_what_it_leaves_out_from_each_result():
    found = planned(
        "Native", {"METHOD": ["AWQ", "RTN"], "SYMMETRIC": True, "OVERRIDES": [{"PATTERN": "x", "W_BIT": 8}]}
    )
    assert [one.recipe.overrides[0].scheme for one in found] == [
        Scheme("AWQ", 8, 128, symmetric=True),
        Scheme("RTN", 8, 128, symmetric=True),
    ]


def test_packages_are_given_their_section():
    (one,) = planned("AutoAWQ", {"ENGINE": "autoawq", "W_BIT": [4], "VERSION": "GEMV"})
    assert one.engine == "autoawq" and one.recipe is None
    assert (one.request["settings"]["W_BIT"], one.request["settings"]["VERSION"]) == (4, "GEMV")
    (one,) = planned("LLMCompressor", {"RECIPE": "RTN", "SCHEME": "FP8_DYNAMIC"})
    assert (one.engine, one.label) == ("llmcompressor", "RTN FP8_DYNAMIC")
    assert one.request["settings"]["SCHEME"] == "FP8_DYNAMIC"


def test_the_core_makes_llm_compressors_checkpoint():
    section = {
        "ENGINE": "native", "SCHEME": "W4A16", "IGNORE": ["lm_head", "model.layers.1.mlp.up_proj"],
        "DAMPENING_FRAC": 0.05, "ACTORDER": "none",
    }  # fmt: skip
    (one,) = planned("LLMCompressor", section)
    assert (one.engine, one.request["layout"]) == ("native", "compressed-tensors")
    recipe = one.recipe
    assert recipe.scheme == Scheme("GPTQ", 4, 128, symmetric=True)
    assert (recipe.damp, recipe.act_order) == (0.05, False)
    assert "to be kept" in recipe.scheme_for("model.layers.1.mlp.up_proj", 128)
    assert recipe.scheme_for("model.layers.11.mlp.up_proj", 128) == recipe.scheme
    (one,) = planned("LLMCompressor", {"ENGINE": "native", "SCHEME": "W4A16_ASYM", "GROUP_SIZE": -1})
    assert one.recipe.scheme == Scheme("GPTQ", 4, -1, symmetric=False)


def test_every_engine_that_a_file_can_ask_for_is_there():
    for algorithm, model in ALGORITHMS.items():
        asked = next(
            (spec.choices for spec in describe(model) if spec.key == "ENGINE"), (OF_ALGORITHM.get(algorithm, NATIVE),)
        )
        assert set(asked) == {engine.name for engine in ENGINES if algorithm in engine.algorithms}


def test_engines_run_where_their_packages_are(monkeypatch, tmp_path):
    assert engine_for(config_of("Native", {})).python() == Path(sys.executable)
    assert engine_for(("LLMCompressor", "llmcompressor")).module == "backend.engines.llm_compressor"
    monkeypatch.setenv("QUANTDECK_ENVIRONMENTS", str(tmp_path))
    with pytest.raises(EngineError, match="engines install autoawq"):
        engine_for(("AutoAWQ", "autoawq"))
    with pytest.raises(EngineError, match="no engine autoawq runs Native"):
        engine_for(("Native", "autoawq"))
