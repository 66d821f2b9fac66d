"""The form shows what matters, and whatever is wrong; hiding loses nothing."""

from __future__ import annotations

import gradio as gr
import pytest

from backend.paths import Home
from backend.schema import parse_yaml
from tests.conftest import EXAMPLES
from ui.chat_pair import ChatPair
from ui.draft import FIELDS, TEMPLATE, merge, open_draft
from ui.fields import Form
from ui.site import build_site
from ui.visible import BY_KEY, CONDITIONAL, CONTROLLING, Visibility, hidden_fields


def hidden(text: str = TEMPLATE, **changes) -> set[str]:
    shown = dict(zip(BY_KEY, open_draft(text).shown, strict=True))
    return hidden_fields(shown | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.mark.parametrize(
    ("changes", "hides", "shows"),
    [
        ({}, ["REVISION", "TEXT_COLUMN", "DATASET_SUBNAME", "CALIBRATION.SEED"], ["SPLIT", "EVALUATION.WINDOW"]),
        ({"MODEL": "a/b"}, [], ["REVISION"]),
        ({"MODEL": "a/b", "CUSTOM_MODEL_PATH": "m"}, ["REVISION"], []),
        ({"DATASET_NAME": "wikitext"}, [], ["TEXT_COLUMN", "DATASET_SUBNAME", "FORMAT_STRING"]),
        ({"DATA_PATH": "x.csv", "DATASET_NAME": "wikitext"}, ["DATASET_SUBNAME"], ["TEXT_COLUMN"]),
        ({"DATASET_NAME": "gsm8k_restructured"}, ["TEXT_COLUMN", "FORMAT_STRING"], ["SPLIT"]),
        ({"EVALUATION__ENABLED": False}, ["EVALUATION.WINDOW", "EVALUATION.TASKS"], ["EVALUATION.ENABLED"]),
        ({"EVALUATION__FIDELITY": False, "EVALUATION__PROTOCOLS": []}, ["EVALUATION.WINDOW"], ["EVALUATION.TASKS"]),
        ({"EVALUATION__FIDELITY": False, "EVALUATION__PROTOCOLS": ["gptq_wikitext"]}, ["EVALUATION.WINDOW"],
         ["EVALUATION.MAX_WINDOWS"]),
        ({"EVALUATION__DATASET_NAME": "c4"}, [], ["EVALUATION.SPLIT", "EVALUATION.TEXT_COLUMN"]),
        ({"CALIBRATION__SHUFFLE": True}, [], ["CALIBRATION.SEED"]),
        ({"ALGORITHM": "AQLM"}, ["llm.AQLM.calibration_config.lr"], ["CALIBRATION.SEED"]),
        ({"llm__AQLM__EFFORT": "reference"}, [], ["llm.AQLM.calibration_config.lr"]),
        ({"llm__AQLM__finetune_config__max_epochs": 0},
         ["llm.AQLM.finetune_config.code_lr", "llm.AQLM.FINETUNE_DATA.PRESET"],
         ["llm.AQLM.finetune_config.max_epochs", "llm.AQLM.calibration_config.finetune_lr"]),
        ({"llm__AQLM__finetune_config__update_codes": False}, ["llm.AQLM.finetune_config.code_lr"],
         ["llm.AQLM.finetune_config.lr"]),
        ({"llm__AQLM__calibration_config__finetune_max_epochs": 0}, ["llm.AQLM.calibration_config.finetune_lr"], []),
        ({}, ["llm.TensorRTLLM.smoothquant"], ["llm.TensorRTLLM.awq_block_size"]),
        ({"llm__TensorRTLLM__quant_method": ["fp8", "smoothquant"]}, ["llm.TensorRTLLM.awq_block_size"],
         ["llm.TensorRTLLM.smoothquant", "llm.TensorRTLLM.calib_size"]),
        ({"llm__TensorRTLLM__quant_method": ["int8"]}, ["llm.TensorRTLLM.calib_size"], []),
        ({"llm__TensorRTLLM__to_quantize": False}, ["llm.TensorRTLLM.quant_method"], ["llm.TensorRTLLM.dtype"]),
        ({"BENCHMARK__ENABLED": False}, ["BENCHMARK.WARMUP", "llm.TensorRTLLM.REQUESTS"], ["llm.TensorRTLLM.BACKEND"]),
        ({"llm__AutoAWQ__FORMAT": "compressed-tensors"}, ["llm.AutoAWQ.VERSION"], []),
        ({}, ["llm.Native.REFINE"], ["llm.Native.DAMP", "llm.AutoAWQ.VERSION"]),
        ({"llm__Native__METHOD": ["RTN"]}, ["llm.Native.DAMP"], []),
        ({"llm__Native__METHOD": ["RTN"], "llm__Native__OVERRIDES": "{PATTERN: x, METHOD: GPTQ}"}, [],
         ["llm.Native.DAMP"]),
        ({"llm__LLMCompressor__RECIPE": "Wanda"}, ["llm.LLMCompressor.SPARSITY", "llm.LLMCompressor.ENGINE"],
         ["llm.LLMCompressor.MASK"]),
        ({"llm__LLMCompressor__RECIPE": "Wanda", "llm__LLMCompressor__MASK": "unstructured"}, [],
         ["llm.LLMCompressor.SPARSITY"]),
        ({"llm__LLMCompressor__SCHEME": "W8A8"}, ["llm.LLMCompressor.GROUP_SIZE"],
         ["llm.LLMCompressor.DAMPENING_FRAC"]),
    ],
)  # fmt: skip
def test_what_matters_is_shown(changes, hides, shows):
    found = hidden(**changes)
    assert set(hides) <= found and not set(shows) & found


def test_an_emptied_control_counts_as_its_default_and_nonsense_hides_nothing_for_good():
    usual = hidden()
    assert hidden(llm__AQLM__finetune_config__max_epochs=None, EVALUATION__ENABLED=None) == usual
    assert hidden(llm__Native__METHOD=3, llm__AutoAWQ__FORMAT={"x": 1}) <= usual | {"llm.Native.DAMP"}


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.stem)
def test_hiding_loses_nothing_of_a_file(path):
    """Every hidden control is given another value and merged: what it sends counts, shown or not."""
    text = path.read_text(encoding="utf-8")
    draft = open_draft(text)
    concealed = hidden(text)
    assert concealed and merge(draft, draft.shown).dump() == text
    numbers = [BY_KEY[key] for key in concealed if BY_KEY[key].spec.type == "int"]
    values = [7 if field in numbers else shown for field, shown in zip(FIELDS, draft.shown, strict=True)]
    written = merge(draft, values).values
    for field in numbers:
        value = written
        for key in field.path:
            value = value[key]
        assert value == 7
    assert parse_yaml(text).config


@pytest.fixture(scope="module")
def laid_out():
    """A form with a fold, as pages make one."""
    draft = open_draft(TEMPLATE)
    with gr.Blocks():
        form = Form(draft.shown, {})
        with form.fold("Evaluation"):
            form.section("Evaluation", advanced=False)
            with form.fold("More"):
                form.section("Evaluation")
        with form.fold("Reference"):
            form.section("AQLM reference")
        for field in FIELDS:
            if field.key not in form.controls:
                form.one(field.key)
        return form, Visibility(form, draft)


def changes(visibility, told=(), before=None, **values):
    """What the listener answers, by dotted key, the folds by their number."""
    at_first = dict(zip(BY_KEY, open_draft(TEMPLATE).shown, strict=True))
    at_first |= {key.replace("__", "."): value for key, value in values.items()}
    before = before or {"hidden": sorted(hidden()), "wrong": []}
    answer = visibility.changes(before, dict.fromkeys(told, "wrong"), [at_first[f.key] for f in CONTROLLING])
    names = ["state", *(f.key for f in CONDITIONAL), *range(len(answer) - 1 - len(CONDITIONAL))]
    skip = gr.skip()
    return {name: update for name, update in zip(names, answer, strict=True) if update != skip}


def test_nothing_is_sent_while_nothing_changes(laid_out):
    assert changes(laid_out[1]) == {}


def test_at_first_the_form_shows_what_matters(laid_out):
    form, _ = laid_out
    assert {key for key, control in form.controls.items() if control.visible is False} == hidden()
    assert [fold.visible for fold, _ in form.folds] == [True, True, False]  # the inner one is made first


def test_parts_are_hidden_with_the_last_of_their_settings(laid_out):
    found = changes(laid_out[1], EVALUATION__ENABLED=False)
    state = found.pop("state")
    assert {key: update["visible"] for key, update in found.items()} == dict.fromkeys(
        [key for key in BY_KEY if key.startswith("EVALUATION.") and key != "EVALUATION.ENABLED" and key not in hidden()]
        + [0],
        False,
    )
    back = changes(laid_out[1], before=state)
    assert back.pop("state") == {"hidden": sorted(hidden()), "wrong": []}
    assert all(update["visible"] for update in back.values()) and set(back) == set(found)
    assert changes(laid_out[1], llm__AQLM__EFFORT="reference")[2]["visible"] is True


def test_what_is_wrong_is_shown_wherever_it_is(laid_out):
    _, visibility = laid_out
    key = "EVALUATION.SPLIT"
    found = changes(visibility, told=[key])
    state = found["state"]
    assert found[key]["visible"] is True and found[0]["open"] and found[1]["open"] and 2 not in found
    assert changes(visibility, told=[key], before=state) == {}, "a part that was closed again stays closed"
    assert changes(visibility, before=state)[key]["visible"] is False


def test_all_folds_of_the_page_follow_their_settings(tmp_path):
    home = Home.at(tmp_path)
    site = build_site(home, ChatPair(home))
    listener, after_checks = [fn for fn in site.fns.values() if fn.name == "on_visible"]
    assert (listener.inputs, listener.outputs) == (after_checks.inputs, after_checks.outputs)
    folds = [block for block in listener.outputs if isinstance(block, gr.Accordion)]
    assert {fold.label for fold in folds} >= {"Tuning text", "Reference procedure", "Benchmark lengths and repetitions"}
    assert len(listener.outputs) == 1 + len(CONDITIONAL) + len(folds) and len(listener.inputs) == 2 + len(CONTROLLING)
    assert len(CONDITIONAL) < len(FIELDS) / 2
