"""The algorithms' sections: one value or a list, combinations that cannot be, exceptions for some Linears."""

import pytest

from backend.errors import ConfigErrors
from backend.schema import parse_yaml
from tests.conftest import EXAMPLES, demo_text


def settings_of(algorithm, section):
    return parse_yaml(demo_text(ALGORITHM=algorithm, llm={algorithm: section})).config.algorithm_settings


def problem_of(algorithm, section):
    with pytest.raises(ConfigErrors) as caught:
        settings_of(algorithm, section)
    (error,) = caught.value.errors
    return error.key, error.detail


def test_a_list_is_read_in_its_order_and_written_back_to_the_letter():
    text = demo_text(ALGORITHM="Native") + ""
    text = text.replace("  AutoAWQ:", "  Native:\n    METHOD: [ AWQ,GPTQ ]   # both\n    W_BIT: [4, 3]\n  AutoAWQ:")
    document = parse_yaml(text)
    settings = document.config.algorithm_settings
    assert (settings.METHOD, settings.W_BIT, settings.Q_GROUP_SIZE) == (("AWQ", "GPTQ"), (4, 3), 128)
    assert document.dump() == text and document.warnings == []


def test_a_list_is_written_on_one_line():
    document = parse_yaml(demo_text())
    document.set(("llm", "AutoAWQ", "W_BIT"), [4, 3])
    document.set(("llm", "Native", "OVERRIDES"), [{"PATTERN": "*.down_proj", "W_BIT": 8}])
    assert "    W_BIT: [4, 3]\n" in document.dump()
    assert parse_yaml(document.dump()).values["llm"]["Native"]["OVERRIDES"] == [{"PATTERN": "*.down_proj", "W_BIT": 8}]


def test_only_the_section_that_algorithm_picks_is_read():
    config = parse_yaml(demo_text(ALGORITHM="Native", llm={"AutoAWQ": {"W_BIT": 99}})).config
    assert config.algorithm_settings.METHOD == "GPTQ" and config.llm.AutoAWQ is None


def test_empty_values_are_defaults():
    assert settings_of("Native", {"W_BIT": None, "METHOD": "", "OVERRIDES": None}) == settings_of("Native", {})
    assert settings_of("AutoAWQ", {"W_BIT": None}).W_BIT == 4


def test_the_list_example_asks_for_four_results():
    config = parse_yaml((EXAMPLES / "native_demo.yaml").read_text(encoding="utf-8")).config
    assert config.algorithm_settings.METHOD == ("AWQ", "GPTQ") and config.algorithm_settings.W_BIT == (4, 3)


@pytest.mark.parametrize(
    ("section", "layout"),
    [
        ({}, "autoawq-gemm"),
        ({"VERSION": "GEMV"}, "autoawq-gemv"),
        ({"W_BIT": 3}, "compressed-tensors"),
        ({"W_BIT": [4, 3]}, "compressed-tensors"),
        ({"W_BIT": [4], "Q_GROUP_SIZE": [64, 128]}, "autoawq-gemm"),
        ({"FORMAT": "compressed-tensors"}, "compressed-tensors"),
    ],
)
def test_the_format_of_awq_follows_the_bits(section, layout):
    assert settings_of("AutoAWQ", section).layout == layout


@pytest.mark.parametrize(
    ("section", "key", "says"),
    [
        ({"W_BIT": [4, 5]}, "W_BIT", "found [4, 5]; 5 is not among the allowed values 2, 3, 4 or 8"),
        ({"W_BIT": [4, 4]}, "W_BIT", "found [4, 4]; each value may stand there once"),
        ({"W_BIT": []}, "W_BIT", "found []; name at least one of 2, 3, 4 or 8"),
        ({"W_BIT": [[4]]}, "W_BIT", "not among"),
        ({"W_BIT": 4.0}, "W_BIT", "found 4.0; allowed"),
        ({"Q_GROUP_SIZE": [64, 100]}, "Q_GROUP_SIZE", "100 is not among the allowed values 128, 64 or 32"),
        ({"FORMAT": "autoawq", "W_BIT": 3}, "FORMAT", "holds 4-bit weights only, beside W_BIT 3; use compressed-"),
        ({"FORMAT": "autoawq", "W_BIT": [4, 3]}, "FORMAT", "beside W_BIT [4, 3]"),
        ({"ENGINE": "autoawq", "W_BIT": 3}, "W_BIT", "found 3; engine autoawq makes 4 bits only"),
        ({"ENGINE": "autoawq", "W_BIT": [4, 8]}, "W_BIT", "found [4, 8]; engine autoawq"),
        ({"ENGINE": "autoawq", "Q_GROUP_SIZE": [64, 128]}, "Q_GROUP_SIZE", "one result per job"),
        ({"ENGINE": "autoawq", "ZERO_POINT": False}, "ZERO_POINT", "needs zero points"),
        ({"ENGINE": "autoawq", "FORMAT": "compressed-tensors"}, "FORMAT", "writes its own format"),
        ({"ENGINE": "gptqmodel"}, "ENGINE", "'native' or 'autoawq'"),
    ],
)
def test_what_awq_cannot_do_is_refused_at_its_key(section, key, says):
    found, detail = problem_of("AutoAWQ", section)
    assert found == f"llm.AutoAWQ.{key}" and says in detail


@pytest.mark.parametrize(
    ("section", "key", "says"),
    [
        ({"METHOD": "awq"}, "METHOD", "found 'awq'; allowed: 'GPTQ', 'AWQ+GPTQ', 'AWQ' or 'RTN'"),
        ({"W_BIT": 5}, "W_BIT", "found 5; allowed: 2, 3, 4 or 8"),
        ({"Q_GROUP_SIZE": 0}, "Q_GROUP_SIZE", "128, 64, 32 or -1"),
        ({"DAMP": 0}, "DAMP", "at least 0.0001"),
        ({"DAMP": "much"}, "DAMP", "a number"),
        ({"DAMP": True}, "DAMP", "a number"),
        ({"REFINE": -1}, "REFINE", "at least 0"),
        ({"REFINE": 2.5}, "REFINE", "whole number"),
        ({"CORRECT": "often"}, "CORRECT", "found 'often'"),
        ({"KEEP": ["lm_head", ""]}, "KEEP", "[] for none"),
        ({"FORMAT": "GEMM", "W_BIT": 3}, "W_BIT", "GEMM holds 4 bits"),
        ({"FORMAT": "GEMV", "W_BIT": [4, 2]}, "W_BIT", "found 2; GEMV holds 4 bits"),
        ({"FORMAT": "GEMM", "Q_GROUP_SIZE": -1}, "Q_GROUP_SIZE", "found -1"),
        ({"OVERRIDES": {"PATTERN": "x"}}, "OVERRIDES", "a list"),
        ({"OVERRIDES": [{"W_BIT": 8}]}, "OVERRIDES.0.PATTERN", "required"),
        ({"OVERRIDES": [{"PATTERN": "x", "WBIT": 8}]}, "OVERRIDES.0", "found the key 'WBIT'; allowed: PATTERN"),
        ({"OVERRIDES": [{"PATTERN": "x", "WBIT": 8}]}, "OVERRIDES.0", "did you mean W_BIT?"),
        ({"OVERRIDES": [{"PATTERN": "x", "W_BIT": 6}]}, "OVERRIDES.0.W_BIT", "found 6; allowed: 2, 3, 4 or 8"),
        ({"OVERRIDES": [{"PATTERN": "x", "W_BIT": [4, 3]}]}, "OVERRIDES.0.W_BIT", "found [4, 3]"),
        ({"OVERRIDES": [{"PATTERN": "x"}]}, "OVERRIDES.0.PATTERN", "nothing is said"),
        ({"OVERRIDES": [{"PATTERN": "x", "KEEP": True, "W_BIT": 8}]}, "OVERRIDES.0.KEEP", "beside W_BIT"),
        ({"FORMAT": "GEMM", "OVERRIDES": [{"PATTERN": "x", "W_BIT": 8}]}, "OVERRIDES.0.W_BIT", "GEMM holds 4"),
        (
            {"FORMAT": "GEMM", "OVERRIDES": [{"PATTERN": "x", "Q_GROUP_SIZE": 64}]},
            "OVERRIDES.0.Q_GROUP_SIZE",
            "groups of one size",
        ),
        (
            {"METHOD": ["RTN", "AWQ", "GPTQ"], "W_BIT": [2, 3, 4], "Q_GROUP_SIZE": [32, 64]},
            "METHOD",
            "make 18 results; a job makes at most 16",
        ),
    ],
)
def test_what_the_core_cannot_do_is_refused_at_its_key(section, key, says):
    found, detail = problem_of("Native", section)
    assert found == f"llm.Native.{key}" and says in detail


def test_sixteen_results_and_whole_numbers_for_fractions_are_fine():
    settings_of("Native", {"METHOD": ["RTN", "AWQ", "GPTQ", "AWQ+GPTQ"], "W_BIT": [2, 3], "Q_GROUP_SIZE": [32, 64]})
    assert settings_of("Native", {"DAMP": 1}).DAMP == 1.0


def test_unquantized_tensors_keep_their_type_unless_the_layout_has_its_own():
    assert settings_of("Native", {}).stored_dtype is None
    assert settings_of("Native", {"FORMAT": "GEMM"}).stored_dtype == "float16"
    assert settings_of("Native", {"dtype": "bfloat16"}).stored_dtype == "bfloat16"


def test_problems_of_an_llm_compressor_recipe_stand_at_their_keys():
    assert problem_of("LLMCompressor", {"RECIPE": "QuIP"})[0] == "llm.LLMCompressor.RECIPE"
    assert problem_of("LLMCompressor", {"RECIPE": "Wanda", "SCHEME": "W4A16"})[0] == "llm.LLMCompressor.SCHEME"
