"""What a job will read, shown before it starts: rows, lengths, sequences, warnings; and what it refuses to read."""

from __future__ import annotations

import shutil

import datasets
import pytest

from backend import cli
from backend.demo import MODEL_DIR
from backend.errors import ConfigErrors, DataError
from backend.jobs.text_checks import check_calibration
from backend.schema import parse_yaml
from backend.sources import preview as preview_module
from backend.sources import preview_rows
from backend.sources.plan import calibration_source
from backend.sources.preview import NotDownloadedError, bins_of, preview, preview_config, summary
from tests.conftest import demo_text, write_jsonl

CHAT = [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": "Four."}]


def look(home, *, rows=5, confined=False, **changes):
    return preview(preview_config(parse_yaml(demo_text(**changes))), home, rows=rows, confined=confined)


def local(home, data, *, shown=5, **changes):
    """A look at rows that lie in the home's data folder."""
    folder = home.user_data / "models"
    folder.mkdir(parents=True, exist_ok=True)
    return look(home, DATA_PATH=str(write_jsonl(folder / "rows.jsonl", data)), confined=True, rows=shown, **changes)


def text_of(row):
    return "".join(text for text, _ in row.pieces)


def test_the_demo_text_as_the_model_sees_it(home):
    changes = {"CALIBRATION": {"SAMPLES": 16, "SEQUENCE_LENGTH": 64}}
    found = look(home, rows=3, **changes)
    config = parse_yaml(demo_text(**changes)).config
    assert found.sequences == check_calibration(calibration_source(config, home), config, MODEL_DIR) == 16
    assert found.unit == "tokens" and [row.number for row in found.rows] == [1, 2, 3]
    assert found.rows[0].pieces[0] == ("<|begin|>", True)  # what the tokenizer adds stands apart
    assert [row.length for row in found.rows] == list(found.lengths[:3])
    assert found.warnings == () and "16 of 16 sequences" in summary(found)
    assert not home.root.exists()  # a look writes nothing


def test_columns_go_through_the_format_string_and_oddities_are_told(home):
    rows = [{"q": "2+2?", "a": "four"}, {"q": "", "a": ""}, {"q": "sky " * 40, "a": "blue"}]
    found = local(
        home, rows, TEXT_COLUMN="q, a", FORMAT_STRING="Q: {q}\nA: {a}",
        CALIBRATION={"SAMPLES": 8, "SEQUENCE_LENGTH": 32, "PACKING": "sample"},
    )  # fmt: skip
    assert text_of(found.rows[0]) == "<|begin|>Q: 2+2?\nA: four"
    told = " ".join(found.warnings)
    assert "makes 3 sequences" in told and "8 were asked for" in told
    assert "1 row has more than 32 tokens" in told and "fewer than 16 tokens" in told


def test_empty_rows_are_shown_and_counted(home):
    found = local(home, [{"text": ""}, {"text": "some words " * 30}], CALIBRATION={"SAMPLES": 1, "SEQUENCE_LENGTH": 16})
    assert (found.read, found.empty, len(found.lengths)) == (2, 1, 1)
    assert found.rows[0].length == 0 and "1 row is empty" in " ".join(found.warnings)


def test_a_text_that_a_job_would_refuse_is_shown_all_the_same(home):
    found = local(home, [{"text": "short"}], CALIBRATION={"SAMPLES": 4, "SEQUENCE_LENGTH": 64})
    assert found.sequences == 0 and "one sequence needs 64" in found.warnings[0]
    found = local(home, [{"text": "w " * 90}, {"text": "x"}], CALIBRATION={"SEQUENCE_LENGTH": 64, "PACKING": "full"})
    assert found.sequences == 1 and "1 of 2 rows" in found.warnings[0]


def test_conversations_are_written_out_by_the_models_template(home):
    found = local(home, [{"text": CHAT}], CALIBRATION={"SAMPLES": 1, "SEQUENCE_LENGTH": 16})
    row = found.rows[0]
    assert row.templated and text_of(row).startswith("<|begin|><|user|>\nWhat is two and two?<|end|>")
    assert [text for text, special in row.pieces if special].count("<|begin|>") == 1


def test_the_order_is_the_jobs_own(home):
    rows = [{"text": f"row number {i} " * 3} for i in range(50)]
    order = datasets.Dataset.from_list(rows).shuffle(seed=7)["text"][:3]
    found = local(home, rows, shown=3, CALIBRATION={"SAMPLES": 1, "SEQUENCE_LENGTH": 16, "SHUFFLE": True, "SEED": 7})
    assert [text_of(row).removeprefix("<|begin|>") for row in found.rows] == list(order)


@pytest.mark.parametrize("kind", ["csv", "parquet", "txt", "folder"])
def test_local_data_of_every_kind(home, kind):
    folder = home.user_data / "models"
    folder.mkdir(parents=True)
    path, data = (
        folder / f"data.{kind}",
        datasets.Dataset.from_list([{"text": f"line {i} of words"} for i in range(40)]),
    )
    if kind == "csv":
        data.to_csv(str(path))
    elif kind == "parquet":
        data.to_parquet(str(path))
    elif kind == "txt":
        path.write_text("\n".join(data["text"]))
    else:
        data.save_to_disk(str(path))
    found = look(home, DATA_PATH=str(path), confined=True, CALIBRATION={"SAMPLES": 2, "SEQUENCE_LENGTH": 32})
    assert text_of(found.rows[1]) == "<|begin|>line 1 of words" and found.sequences == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"TEXT_COLUMN": "story"}, "no column 'story'; it has text"),
        ({"SPLIT": "dev"}, "train, validation, test"),
    ],
)
def test_what_is_missing_is_told_with_what_there_is(home, changes, words):
    with pytest.raises(DataError, match=words):
        look(home, **changes)


def test_a_placeholder_that_is_no_column_is_refused(home):
    with pytest.raises(ConfigErrors, match="{title} is not among TEXT_COLUMN"):
        look(home, FORMAT_STRING="{title}")


def test_settings_of_other_sections_are_not_in_the_way(home):
    assert look(home, JOB_ID="../x", ALGORITHM="nothing", CUDA_ID="x").rows


def test_paths_are_confined_for_the_page(home, tmp_path):
    path = write_jsonl(tmp_path / "secret.jsonl", [{"text": "hidden words"}])
    with pytest.raises(ConfigErrors, match="DATA_PATH"):
        look(home, DATA_PATH=str(path), confined=True)
    assert look(home, DATA_PATH=str(path)).rows


def test_a_model_without_tokenizer_gives_characters(home):
    found = look(home, MODEL="somebody/model")
    assert found.unit == "characters" and found.sequences is None
    assert found.lengths[0] == len(text_of(found.rows[0])) or found.rows[0].cut
    assert "downloaded when the job starts" in found.notes[-1]


def test_a_broken_tokenizer_is_told(home):
    folder = home.user_data / "models" / "m"
    shutil.copytree(MODEL_DIR, folder)
    (folder / "tokenizer.json").write_text("{")
    found = look(home, MODEL=str(folder), confined=True)
    assert found.unit == "characters" and "tokenizer.json is broken" in " ".join(found.notes)


def test_a_dataset_of_the_hub_is_not_fetched_unasked(home):
    with pytest.raises(NotDownloadedError, match="nobody/nothing:train is not on this machine"):
        look(home, DATASET_NAME="nobody/nothing")
    assert not home.root.exists()


def test_a_row_that_fits_no_memory_is_an_error_and_nothing_more(home, monkeypatch):
    folder = home.user_data / "models"
    folder.mkdir(parents=True)
    monkeypatch.setattr(preview_module, "MEMORY_BYTES", 400 * 2**20)
    with open(folder / "huge.jsonl", "wb") as file:
        file.truncate(2**30)  # one line of zeros, no blocks on the disk
    with pytest.raises(DataError, match="memory"):
        look(home, DATA_PATH=str(folder / "huge.jsonl"), confined=True)


def test_a_large_text_is_read_in_part(home, monkeypatch, tmp_path):
    monkeypatch.setattr(preview_rows, "MOST_ROWS", 30)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row {i}"} for i in range(100)])
    source = {"name": None, "subset": None, "split": "train", "columns": ["text"], "template": None, "path": str(path)}
    request = {
        "source": source, "model_dir": str(MODEL_DIR), "cache_dir": str(tmp_path), "samples": 99, "length": 16,
        "packing": "join", "shuffle": False, "seed": 0, "mode": "auto", "rows": 2, "seconds": 60, "online": False,
        "text": "calibration",
    }  # fmt: skip
    found = preview_rows.preview_rows(request)
    assert found["read"] == 30 and not found["complete"]
    assert "in the part that a preview reads" in found["warnings"][0] and "first 30 rows" in " ".join(found["notes"])


def tuned(**section):
    """A job file that tunes, on text of its own if that is given."""
    own = {"calibration_config": {"num_codebooks": 2, "nbits_per_codebook": 8, "nsamples": 12, "val_size": 2}}
    return {"ALGORITHM": "AQLM", "llm": {"AQLM": {**own, **section}}}


def look_at_tuning(home, **changes):
    document = parse_yaml(demo_text(**changes))
    return preview(preview_config(document, "tuning"), home, text="tuning", rows=2, confined=True)


def test_the_tuning_text_in_its_own_length_and_how_it_is_divided(home):
    folder = home.user_data / "models"
    folder.mkdir(parents=True)
    path = write_jsonl(folder / "own.jsonl", [{"q": f"what is {i}", "a": f"it is {i}"} for i in range(99)])
    data = {"DATA_PATH": str(path), "TEXT_COLUMN": "q, a", "FORMAT_STRING": "{q}? {a}!", "SAMPLES": 8}
    short = {"finetune_config": {"model_seqlen": 48, "batch_size": 2}}
    found = look_at_tuning(home, **tuned(FINETUNE_DATA=data, **short))
    assert text_of(found.rows[0]) == "<|begin|>what is 0? it is 0!"
    assert (found.sequences, found.wanted, found.length) == (8, 8, 48)
    assert found.notes[0] == "6 sequences are learned from; the last 2 decide which step is kept."
    again = look_at_tuning(home, **tuned(finetune_config={"model_seqlen": 48, "batch_size": 2}))
    assert again.label == "quantdeck/demo:train" and again.wanted in (8, 12)  # the calibration text once more
    few = look_at_tuning(home, **tuned(FINETUNE_DATA={**data, "SAMPLES": 2}, finetune_config={"model_seqlen": 48}))
    assert any("finetune_config.batch_size" in warning for warning in few.warnings)
    long = look_at_tuning(home, **tuned(FINETUNE_DATA=data, finetune_config={"model_seqlen": 4096}))
    assert "the tuning text has" in long.warnings[0].lower() and "finetune_config.model_seqlen" in long.warnings[0]


def test_a_tuning_text_that_is_not_there_or_not_read_is_told_at_its_key(home):
    with pytest.raises(ConfigErrors, match="does not exist") as caught:
        look_at_tuning(home, **tuned(FINETUNE_DATA={"DATA_PATH": "user_data/models/none.jsonl"}))
    assert caught.value.errors[0].key == "llm.AQLM.FINETUNE_DATA.DATA_PATH"
    with pytest.raises(DataError, match="does not tune its model"):
        look_at_tuning(home, **tuned(finetune_config={"max_epochs": 0}))
    with pytest.raises(ConfigErrors, match="FORMAT_STRING"):
        look_at_tuning(home, **tuned(FINETUNE_DATA={"FORMAT_STRING": "{x}", "DATASET_NAME": "quantdeck/demo"}))


def test_the_calibration_preview_counts_by_the_algorithms_own_keys(home):
    changes = {key: value for key, value in tuned().items()}
    section = {**changes["llm"]["AQLM"]["calibration_config"], "model_seqlen": 96}
    document = parse_yaml(demo_text(**{**changes, "llm": {"AQLM": {"calibration_config": section}}}))
    document.set(("CALIBRATION",), {})
    found = preview(preview_config(document), home, rows=1)
    assert (found.wanted, found.length) == (12, 96)
    document.set(("llm", "AQLM", "calibration_config", "nsamples"), "many")  # wrong, and told elsewhere
    assert preview(preview_config(document), home, rows=1).wanted == 128


def test_lengths_fall_into_ranges_without_a_gap():
    lengths = [3, 3, 4, 9, 17, 40]
    for most in (1, 4, 40, 1000):
        bins = bins_of(lengths, most)
        assert len(bins) <= most and sum(n for *_, n in bins) == len(lengths)
        assert all(b[0] == a[1] + 1 for a, b in zip(bins, bins[1:], strict=False))
    assert bins_of([], 5) == []


def test_the_command_prints_rows_warnings_and_lengths(home, tmp_path, capsys):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "one \x1b[31m red"}, {"text": "more words " * 40}])
    job = tmp_path / "job.yaml"
    job.write_text(demo_text(DATA_PATH=str(path)))
    assert cli.main(["preview", str(job), "--rows", "1", "--home", str(home.root)]) == 0
    told = capsys.readouterr().out
    assert "-- row 1, " in told and "-- row 2" not in told and "\x1b" not in told
    assert "warning: " in told and "#" in told
    job.write_text(demo_text(DATASET_NAME="nobody/nothing"))
    assert cli.main(["preview", str(job), "--home", str(home.root)]) == 1
    assert "--online" in capsys.readouterr().err
    job.write_text(demo_text(**tuned(finetune_config={"model_seqlen": 64, "batch_size": 2})))
    assert cli.main(["preview", str(job), "--text", "tuning", "--rows", "1", "--home", str(home.root)]) == 0
    assert "decide which step is kept" in capsys.readouterr().out
