"""What is known of an AQLM job before it starts: refusals at their keys, Linears left out, sizes and bits."""

import json

import pytest

from backend.errors import ConfigErrors
from backend.jobs.preflight import check_job
from backend.schema import parse_yaml
from backend.sources.prepare import prepare
from tests.conftest import EXAMPLES, write_jsonl
from tests.jobs.aqlm_jobs import aqlm_text, tiny_model

WORDS = " ".join(["one two three four five six seven eight nine ten"] * 12)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def check(home, *model, **changes):
    if model:  # of few positions, too few for the guides' windows
        changes.setdefault("EVALUATION", {"ENABLED": False})
    return check_job(parse_yaml(aqlm_text("job", *model, **changes)).config, home)


def problems(home, *model, **changes):
    with pytest.raises(ConfigErrors) as caught:
        check(home, *model, **changes)
    return {error.key.removeprefix("llm.AQLM."): error.detail for error in caught.value.errors}


def test_the_demo_example_passes_and_tells_bits_and_sizes(home):
    config = parse_yaml((EXAMPLES / "aqlm_demo.yaml").read_text(encoding="utf-8")).config
    checked = check_job(config, home)
    assert [one.name for one in checked.configurations] == ["calibrated", "tuned"]
    assert [one.folder for one in checked.configurations] == ["tmp/caliberation", "tmp/converted"]
    assert checked.bits["calibrated"] == checked.bits["tuned"] == pytest.approx(2.33, abs=0.01)
    assert 4e6 < checked.predicted["tuned"] < 5e6
    assert any("decide which step is kept" in note for note in checked.notes)


def test_the_guide_is_valid_before_its_model_is_there(home):
    checked = check_job(parse_yaml((EXAMPLES / "aqlm_guide.yaml").read_text(encoding="utf-8")).config, home)
    assert checked.bits == {} and any("is downloaded" in note for note in checked.notes)


@pytest.mark.parametrize(
    ("calibration", "key", "says"),
    [
        ({"in_group_size": 7}, "in_group_size", "found 7, which divides the inputs of no Linear (64, 128), so nothing"),
        ({"in_group_size": 7}, "in_group_size", "use 16 or 8 or 4"),
        ({"nbits_per_codebook": 12}, "nbits_per_codebook", "fewer than the 4096 words of a codebook; use at most 10"),
        ({"num_codebooks": 1, "nbits_per_codebook": 16}, "nbits_per_codebook", "e.g. num_codebooks 2 and nbits_per"),
        ({"model_seqlen": 256}, "model_seqlen", "found 256; the model has 128 positions"),
    ],
)
def test_what_the_model_cannot_have_is_told_at_its_key(home, model, calibration, key, says):
    assert says in problems(home, model, calibration_config=calibration)[f"calibration_config.{key}"]


def test_what_tuning_asks_of_the_model_is_told_at_its_key(home, model):
    found = problems(home, model, finetune_config={"model_seqlen": 256, "block_type": "Qwen2DecoderLayer"})
    assert "128 positions" in found["finetune_config.model_seqlen"]
    assert "the model is a LlamaForCausalLM, whose layers are called Llama" in found["finetune_config.block_type"]
    check(home, model, finetune_config={"block_type": "LlamaDecoderLayer"})
    check(home, model, finetune_config={"max_epochs": 0, "block_type": "Qwen2DecoderLayer"})
    long = problems(home, model, CALIBRATION={"SEQUENCE_LENGTH": 512})
    assert "128 positions" in long["CALIBRATION.SEQUENCE_LENGTH"]


def test_a_beam_wider_than_the_codebooks_of_this_device_is_told(home):
    calibration = {"num_codebooks": None, "nbits_per_codebook": None}
    found = problems(home, calibration_config=calibration, finetune_config={"beam_size": 300})
    assert "a codebook of 8 bits has 256 codewords" in found["finetune_config.beam_size"]
    wide = {"calibration_config": {**calibration, "beam_size": 300}}
    assert "calibration_config.beam_size" in problems(home, **wide, EFFORT="reference")
    check(home, **wide)  # only the reference procedure reads it


def test_linears_that_stay_in_16_bits_are_told(home, model):
    notes = check(home, model, calibration_config={"in_group_size": 32, "nbits_per_codebook": 7}).notes
    (told,) = [note for note in notes if "16 bits" in note]
    assert told.startswith("6 of 21 Linears stay in 16 bits: 6 since it has 64 groups, fewer than the 128 words")


def test_the_reference_procedure_is_told_to_take_long(home):
    assert any("many times slower" in note for note in check(home, EFFORT="reference").notes)


def test_a_text_that_is_too_short_is_told_at_its_key(home, tmp_path):
    path = write_jsonl(tmp_path / "short.jsonl", [{"text": WORDS}])
    found = problems(home, DATA_PATH=str(path), calibration_config={"val_size": 8})
    assert "sequences are read in all" in found["calibration_config.val_size"]
    found = problems(home, FINETUNE_DATA={"DATA_PATH": str(path)}, finetune_config={"batch_size": 16})
    assert "training sequences; give at most that many" in found["finetune_config.batch_size"]
    found = problems(home, FINETUNE_DATA={"DATA_PATH": "no/such"})
    assert "does not exist" in found["FINETUNE_DATA.DATA_PATH"]
    found = problems(home, FINETUNE_DATA={"DATA_PATH": str(path), "TEXT_COLUMN": "words"})
    assert "has no column 'words'" in found["FINETUNE_DATA.TEXT_COLUMN"]


def test_rows_of_full_length_are_asked_for_or_joined_never_searched_without_end(home, tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": WORDS if i < 6 else "short"} for i in range(60)])
    calibration = {"nsamples": 6, "val_size": 2}
    check(home, DATA_PATH=str(path), calibration_config=calibration, FINETUNE_DATA={"SAMPLES": 6},
          CALIBRATION={"PACKING": "full"})  # fmt: skip
    found = problems(home, DATA_PATH=str(path), CALIBRATION={"PACKING": "full"})
    assert "6 of 60 rows of the tuning text have 32 tokens or more, and 12 sequences" in found["DATA_PATH"]
    check(home, DATA_PATH=str(path))


class Events:
    def note(self, **event):
        pass


def test_the_tokens_of_both_texts_are_made_before_any_work(home, model, tmp_path):
    from safetensors.torch import load_file

    path = write_jsonl(tmp_path / "tune.jsonl", [{"text": WORDS}] * 8)
    text = aqlm_text("job", model, FINETUNE_DATA={"DATA_PATH": str(path), "SAMPLES": 20, "VAL_SAMPLES": 3},
                     EVALUATION={"ENABLED": False}, finetune_config={"model_seqlen": 24})  # fmt: skip
    request = {"home": str(home.root), "config": text, "out": str(tmp_path / "out"), "device": "cpu"}
    made = prepare(request, Events())
    assert load_file(made["tokens_file"])["tokens"].shape == (12, 32)
    tuning = load_file(made["tuning_file"])
    assert (tuning["train"].shape, tuning["validation"].shape) == ((17, 24), (3, 24))
    untuned = aqlm_text("job", model, finetune_config={"max_epochs": 0}, EVALUATION={"ENABLED": False})
    assert "tuning_file" not in prepare({**request, "config": untuned}, Events())


def test_a_wrong_class_of_the_right_family_is_refused_before_the_text_is_read(home, model, tmp_path):
    text = aqlm_text("job", model, finetune_config={"block_type": "LlamaLayer"}, EVALUATION={"ENABLED": False})
    with pytest.raises(ConfigErrors, match="layers of LlamaForCausalLM are LlamaDecoderLayer"):
        prepare({"home": str(home.root), "config": text, "out": str(tmp_path / "out")}, Events())


def test_remote_code_of_the_guides_file_stays_off(home, model):
    """The guide's switch changes nothing: a model with code is refused as ever."""
    folder = tiny_model(home.root / "user_data" / "models" / "coded")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    found = problems(home, folder, calibration_config={"trust_remote_code": True})
    assert "auto_map" in found["MODEL"]
