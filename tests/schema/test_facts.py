"""What the schema says of a setting beside its values: where it comes from, and when it matters."""

from __future__ import annotations

import importlib

import pytest

from backend.schema import describe, parse_yaml, reference, sections
from backend.schema.facts import (
    AQLM_GUIDE,
    AWQ_GUIDE,
    GUIDES,
    LLM_COMPRESSOR,
    LM_EVAL,
    MODELOPT,
    NYUNTAM,
    OWN,
    TENSORRT_EXAMPLE,
    TENSORRT_GUIDE,
    full_key,
    matters,
    told,
    unless,
    when,
)
from backend.schema.fields import setting
from backend.schema.native import OverrideSettings
from tests.conftest import EXAMPLES

SETTINGS = {setting.key: setting for setting in reference.settings()}
SOURCES = {
    AQLM_GUIDE, AWQ_GUIDE, GUIDES, LLM_COMPRESSOR, LM_EVAL, MODELOPT, NYUNTAM, OWN, TENSORRT_EXAMPLE, TENSORRT_GUIDE,
}  # fmt: skip
GUIDE_FILES = {
    AWQ_GUIDE: ("awq_guide", "llm.AutoAWQ"),
    AQLM_GUIDE: ("aqlm_guide", "llm.AQLM"),
    TENSORRT_GUIDE: ("tensorrtllm_guide", "llm.TensorRTLLM"),
}
MODIFIERS = {
    "QuantizationModifier": "quantization", "GPTQModifier": "gptq", "SmoothQuantModifier": "transform.smoothquant",
    "SparseGPTModifier": "pruning", "AutoRoundModifier": "autoround",
}  # fmt: skip
CONDITIONS = [
    pytest.param(setting, condition, id=f"{setting.key}-{condition.key}")
    for setting in SETTINGS.values()
    for either in setting.spec.visible_when
    for condition in either
]


def leaves(values, path=()):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield ".".join((*path, key))


def example(name):
    return set(leaves(parse_yaml((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8")).values))


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=lambda s: s.key)
def test_every_setting_has_help_a_label_and_a_known_source(setting):
    spec = setting.spec
    assert spec.help and spec.label and spec.section
    assert spec.source.partition(", ")[0] in SOURCES


def test_a_source_must_be_given():
    with pytest.raises(TypeError, match="source"):
        setting(1, label="A", help="Something.", section="S")


@pytest.mark.parametrize(("source", "file"), GUIDE_FILES.items(), ids=lambda value: str(value))
def test_what_is_said_to_be_a_guides_stands_in_the_guides_file_and_the_other_way_round(source, file):
    name, section = file
    found = {key for key in example(name) if key.startswith(f"{section}.") and key in SETTINGS}
    assert found == {key for key, setting in SETTINGS.items() if setting.spec.source == source}


def test_what_the_guides_have_in_common_stands_in_one_of_their_files():
    found = {key for name, _ in GUIDE_FILES.values() for key in example(name)}
    common = {key for key, setting in SETTINGS.items() if setting.spec.source == GUIDES}
    assert common <= found and {key for key in found if "." not in key and key in SETTINGS} == common


def test_upper_case_keys_of_the_lower_case_sections_are_our_own():
    for key, found in SETTINGS.items():
        if key.startswith(("llm.AQLM.", "llm.TensorRTLLM.")):
            ours = found.spec.source in (OWN, MODELOPT)
            assert ours == found.path[-1].isupper(), key


def test_fields_of_llm_compressors_modifiers_exist():
    pytest.importorskip("llmcompressor")
    named = [s.spec.source.partition(", ")[2] for s in SETTINGS.values() if s.spec.source.startswith(LLM_COMPRESSOR)]
    for modifier, _, field in (name.partition(".") for name in named if name):
        module = importlib.import_module(f"llmcompressor.modifiers.{MODIFIERS[modifier]}")
        assert field in getattr(module, modifier).model_fields, (modifier, field)


@pytest.mark.parametrize(("setting", "condition"), CONDITIONS)
def test_a_condition_names_another_setting_and_values_that_it_can_have(setting, condition):
    target = SETTINGS[full_key(setting.path[:-1], condition.key, SETTINGS)]
    assert target.key != setting.key and not target.spec.ignored
    spec = target.spec
    for value in condition.values:
        if value is None:
            assert spec.default in (None, "", []) or spec.optional or spec.type == "list", target.key
        elif spec.choices:
            assert value in spec.choices
        elif spec.type == "bool":
            assert isinstance(value, bool)
        elif spec.type == "int":
            assert type(value) is int and spec.ge <= value <= spec.le
        else:
            assert spec.type == "str" and isinstance(value, str)
    if spec.choices:  # neither always nor never
        kept = [choice for choice in spec.choices if condition.holds(choice)]
        assert 0 < len(kept) < len(spec.choices) + (None in condition.values)


def test_no_setting_is_hidden_by_one_that_can_be_hidden_by_it():
    def targets(key, seen=()):
        assert key not in seen, (key, seen)
        for either in SETTINGS[key].spec.visible_when:
            for condition in either:
                targets(full_key(SETTINGS[key].path[:-1], condition.key, SETTINGS), (*seen, key))

    for key in SETTINGS:
        targets(key)


def test_keys_that_are_kept_only_are_never_hidden():
    assert not [key for key, setting in SETTINGS.items() if setting.spec.ignored and setting.spec.visible_when]


def test_items_of_lists_say_where_they_come_from():
    assert {spec.source for spec in describe(OverrideSettings)} == {OWN}
    assert len(list(sections(OverrideSettings))) == 1


def test_conditions():
    values = {"A": "x", "B": ["p", "q"], "C": None, "D": "", "E": []}
    assert matters((), values.get)
    assert when("A", "x", "y").holds("x") and not when("A", "y").holds("x")
    assert when("B", "q").holds(values["B"]) and not when("B", "r").holds(values["B"])
    assert unless("B", "q").holds(["p", "q"]) and not unless("B", "q").holds(["q"])
    assert all(when(key, None).holds(values[key]) for key in "CDE")
    assert not any(unless(key, None).holds(values[key]) for key in "CDE")
    assert not when("N", 0).holds(None) and unless("N", 0).holds(3) and when("F", False).holds(False)
    both = ((when("A", "x"),), (when("C", "y"), unless("B", None)))
    assert matters(both, values.get) and not matters((*both, (unless("C", None),)), values.get)
    assert told(both) == "`A` is x and (`C` is y or `B` is given)"
    assert told(((unless("A", None, "z"),),)) == "`A` is none of empty, z"
