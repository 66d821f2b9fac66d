"""What the job page shows of TensorRT-LLM: the guide's table, or why there is none and what to do."""

from ui.tensorrtview import tensorrt

SINGLE = {"decode_tokens_per_s": 194.86, "requests": 16, "peak_bytes": 5_690_000_000}
LOAD = {"output_tokens_per_s": 1200.0, "requests": 64}


def entry(name, ran, **more):
    return {"name": name, "label": name.upper(), "artefact": "/gone", "ran": ran, **more}


def test_a_job_that_asked_nothing_of_it_shows_nothing():
    assert tensorrt("0123", [entry("w4", None), {"name": "w3", "label": "", "artefact": "/x"}]) == ""


def test_what_was_measured_stands_in_the_guides_table():
    ran = {
        "baseline": {"weight_bytes": 12_550_000_000, "single": {**SINGLE, "peak_bytes": None}, "perplexity": None},
        "quantized": {
            "weight_bytes": 3_420_000_000, "single": SINGLE, "load": LOAD, "perplexity": {"perplexity": 6.02},
        },
    }  # fmt: skip
    html = tensorrt("0123", [entry("int4_awq", ran)])
    assert "Baseline, 16 bit" in html and "INT4_AWQ" in html
    assert all(value in html for value in ("3.42 GB", "5.69 GB", "194.9", "1200.0", "6.020", "12.6 GB"))
    assert "Not run on this machine" not in html


def test_reasons_are_told_once_and_which_results_they_are_about(tmp_path):
    (tmp_path / "run_tensorrt_llm.sh").write_text("#!/bin/sh\necho '<b>'\n", encoding="utf-8")
    gpu, image = {"stages": ["bench"], "reason": "found no <GPU>"}, {"stages": ["bench"], "reason": "found no image"}
    html = tensorrt(
        "0123",
        [entry("int8", {"obstacles": [gpu]}, artefact=str(tmp_path)), entry("fp8", {"obstacles": [gpu, image]})],
    )
    assert html.count("found no &lt;GPU&gt;") == 1 and "FP8: found no image" in html
    assert "none are guessed" in html and "echo &#x27;&lt;b&gt;&#x27;" in html
    assert html.count("<details>") == 1 and "/download/0123/int8/run_tensorrt_llm.sh" in html
