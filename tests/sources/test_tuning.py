"""The text on which the whole model is tuned: where it comes from, how it is divided, what is refused."""

import datasets
import pytest

from backend.errors import ConfigErrors, DataError
from backend.schema import parse_yaml
from backend.sources.plan import calibration_source, tuning_source
from backend.sources.texts import TextSource, read_rows
from backend.sources.tuning import held_out, tuning_sequences
from tests.conftest import demo_text, write_jsonl
from tests.jobs.aqlm_jobs import aqlm_text

PRESET = {"PRESET": "gsm8k_restructured"}
GSM8K = "Question: {question}\nAnswer: {answer}"


def config_of(**changes):
    return parse_yaml(aqlm_text("job", **changes)).config


def encode(rows):
    return [[int(word) for word in row.split()] for row in rows]


def test_without_a_text_of_its_own_tuning_reads_the_calibration_text(home):
    config = config_of(TEXT_COLUMN="text", SPLIT="validation")
    assert tuning_source(config, home) == calibration_source(config, home)
    assert tuning_source(config_of(FINETUNE_DATA={"SAMPLES": 8}), home) == TextSource(
        "quantdeck/demo", None, "train", ("text",)
    )


def test_a_job_that_tunes_nothing_has_no_tuning_text(home):
    assert tuning_source(config_of(finetune_config={"max_epochs": 0}, FINETUNE_DATA=PRESET), home) is None
    assert tuning_source(parse_yaml(demo_text()).config, home) is None


def test_the_preset_comes_from_the_hub_unless_it_was_saved_before(home):
    config = config_of(FINETUNE_DATA={**PRESET, "SPLIT": "test"})
    assert tuning_source(config, home) == TextSource("openai/gsm8k", "main", "test", ("question", "answer"), GSM8K)
    folder = home.user_data / "datasets" / "gsm8k_restructured"
    rows = [{"question": "1 + 1?", "answer": "2", "text": "Question: 1 + 1?\nAnswer: 2"}]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(folder))
    source = tuning_source(config_of(FINETUNE_DATA=PRESET), home)
    assert source.path == folder and list(read_rows(source)) == ["Question: 1 + 1?\nAnswer: 2"]


def test_the_presets_template_makes_what_the_guide_saved(home, tmp_path):
    path = write_jsonl(tmp_path / "gsm8k.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    data = {"DATA_PATH": str(path), "TEXT_COLUMN": "question, answer", "FORMAT_STRING": GSM8K}
    assert list(read_rows(tuning_source(config_of(FINETUNE_DATA=data), home))) == ["Question: 1 + 1?\nAnswer: 2"]


def test_the_guides_name_is_the_preset_in_either_place(home):
    there = TextSource("openai/gsm8k", "main", "train", ("question", "answer"), GSM8K)
    assert calibration_source(config_of(DATASET_NAME="gsm8k_restructured"), home) == there
    assert tuning_source(config_of(FINETUNE_DATA={"DATASET_NAME": "gsm8k_restructured"}), home) == there


def test_a_path_that_does_not_exist_is_an_error_and_no_download(home):
    for data in ({"DATA_PATH": "no/such"}, {**PRESET, "DATA_PATH": "no/such"}):
        with pytest.raises(ConfigErrors, match="does not exist"):
            tuning_source(config_of(FINETUNE_DATA=data), home)


def test_sequences_have_their_own_length_and_number():
    rows = [f"{i} {i}" for i in range(200)]
    own = {"FINETUNE_DATA": {"SAMPLES": 5}, "finetune_config": {"model_seqlen": 16, "batch_size": 2}}
    assert [len(s) for s in tuning_sequences(config_of(**own), rows, encode)] == [16] * 5
    as_calibrated = config_of(finetune_config={"model_seqlen": 16})
    assert len(tuning_sequences(as_calibrated, rows, encode)) == 12
    full = config_of(**own, CALIBRATION={"PACKING": "full"})
    with pytest.raises(DataError, match="0 of 200 rows"):
        tuning_sequences(full, rows, encode)


@pytest.mark.parametrize(
    ("data", "found", "held"), [({}, 12, 3), ({}, 40, 4), ({"VAL_SAMPLES": 6}, 12, 6), ({}, 6, 1)]
)  # fmt: skip
def test_the_validation_is_that_of_calibration_but_at_most_a_quarter(data, found, held):
    assert held_out(config_of(FINETUNE_DATA=data), found) == held


@pytest.mark.parametrize(
    ("data", "found", "key", "says"),
    [
        (
            {"VAL_SAMPLES": 12},
            12,
            "FINETUNE_DATA.VAL_SAMPLES",
            "the tuning text makes 12 sequences of 32",
        ),
        ({}, 1, "FINETUNE_DATA.VAL_SAMPLES", "give more text"),
        ({}, 4, "finetune_config.batch_size", "found 4, but there are 3 training sequences; give at most that many"),
    ],
)
def test_a_text_too_short_for_a_batch_is_refused_before_hours_of_work(data, found, key, says):
    with pytest.raises(ConfigErrors) as caught:
        held_out(config_of(FINETUNE_DATA=data), found)
    (error,) = caught.value.errors
    assert error.key == f"llm.AQLM.{key}" and says in error.detail
