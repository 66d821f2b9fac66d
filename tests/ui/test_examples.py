"""Examples as starting points, and sizes that suit the demo model when an algorithm is picked for it."""

import pytest

from backend.errors import QuantdeckError
from backend.schema import parse_yaml
from tests.conftest import EXAMPLES
from ui.draft import FIELDS, TEMPLATE, merge, open_draft
from ui.examples import OF_ALGORITHM, demo_values, example_text, examples


def shown(text):
    return dict(zip((f.key for f in FIELDS), open_draft(text).shown, strict=True))


def test_every_example_is_offered_and_says_what_it_is():
    offered = examples()
    assert [name for _, name in offered] == sorted(path.stem for path in EXAMPLES.glob("*.yaml"))
    for label, name in offered:
        assert label.startswith(f"{name}: ") and len(label) > len(name) + 10
        assert parse_yaml(example_text(name)).config
    with pytest.raises(QuantdeckError):
        example_text("../app")


def test_picking_aqlm_for_the_demo_makes_a_job_that_can_start():
    draft = open_draft(TEMPLATE)
    values = shown(TEMPLATE) | {"ALGORITHM": "AQLM"}
    values |= demo_values("AQLM", values)
    config = merge(draft, list(values.values())).config
    example = parse_yaml(example_text(OF_ALGORITHM["AQLM"])).config
    assert config.algorithm_settings == example.algorithm_settings
    assert config.calibration == example.calibration


def test_what_was_set_already_stays_and_other_models_are_left_alone():
    text = TEMPLATE.replace("llm:\n", "llm:\n  AQLM:\n    calibration_config: {nsamples: 64}\n")
    found = demo_values("AQLM", shown(text))
    assert "llm.AQLM.calibration_config.nsamples" not in found and "llm.AQLM.calibration_config.model_seqlen" in found
    assert demo_values("AQLM", shown(TEMPLATE.replace("quantdeck/demo", "a/model"))) == {}
    assert demo_values("AutoAWQ", shown(TEMPLATE)) == {}
