"""Every setting can be shown: label, help, bounds, choices."""

import pytest

from backend.schema import ALGORITHMS, SECTIONS, JobConfig, NativeSettings, describe, sections

MODELS = (
    JobConfig,
    *(model for algorithm in ALGORITHMS.values() for _, model in sections(algorithm)),
    *SECTIONS.values(),
)
FIELDS = [pytest.param(model, spec, id=f"{model.__name__}.{spec.key}") for model in MODELS for spec in describe(model)]


@pytest.mark.parametrize(("model", "spec"), FIELDS)
def test_every_field_explains_itself(model, spec):
    assert len(spec.help) > 15 and spec.help.endswith((".", '".')), spec.help
    assert spec.label and spec.section
    if spec.type in ("choice", "int_choice"):
        assert spec.choices
        assert spec.required or spec.default in spec.choices or (spec.optional and spec.default is None)
    if spec.type == "int" and spec.key.upper() != "SEED":
        assert spec.ge is not None and spec.unit


def test_keys_that_nothing_reads_are_marked():
    assert [s.key for s in describe(JobConfig) if s.ignored] == ["JOB_PATH", "ALGO_TYPE"]


def test_lists_of_choices_are_marked():
    several = {name: [s.key for s in describe(m) if s.several] for name, m in ALGORITHMS.items()}
    assert several["AutoAWQ"] == ["W_BIT", "Q_GROUP_SIZE"]
    assert several["Native"] == ["METHOD", "W_BIT", "Q_GROUP_SIZE"]
    method = next(s for s in describe(NativeSettings) if s.key == "METHOD")
    assert method.type == "choice" and method.choices == ("GPTQ", "AWQ+GPTQ", "AWQ", "RTN")
    assert "AWQ alone hardly beats plain rounding below 4 bits" in method.help


def test_group_size_offers_the_guides_values():
    (spec,) = [s for s in describe(ALGORITHMS["AutoAWQ"]) if s.key == "Q_GROUP_SIZE"]
    assert spec.type == "int_choice" and spec.choices == (128, 64, 32) and spec.default == 128


def test_numbers_that_may_be_empty_are_still_numbers():
    types = {s.key: s.type for model in MODELS for s in describe(model)}
    assert types["MAX_WINDOWS"] == types["SAMPLES"] == "int"
    assert (
        types["ENABLED"] == "bool"
        and types["TASKS"] == "list"
        and types["OVERRIDES"] == "yaml"
        and types["FORMAT_STRING"] == "str"
    )
