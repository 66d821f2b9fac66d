"""What people see of a job's stages, from what the runner and the programs call them."""

from backend.jobs.stage_names import index_of, seconds, shown_stages

AQLM = [stage.label for stage in shown_stages("AQLM")]


def label_of(algorithm, *event):
    index = index_of(algorithm, *event)
    return shown_stages(algorithm)[index].label if index >= 0 else None


def test_every_event_of_a_tuned_job_has_its_place_in_the_order_of_the_work():
    events = [
        ("download",), ("calibrate",), ("quantize", "calibrated"), ("save",), ("convert", "calibrated"),
        ("publish", "calibrated"), ("publish_text",), ("tune", "tuned"), ("convert", "tuned"), ("publish", "tuned"),
        ("evaluate_baseline",), ("evaluate_quantized", "calibrated"), ("evaluate_quantized", "tuned"),
        ("evaluate_fidelity", "tuned"), ("benchmark", "tuned"), ("report",),
    ]  # fmt: skip
    places = [index_of("AQLM", *event) for event in events]
    assert places == sorted(places) and places[0] == 0 and places[-1] == len(AQLM) - 1
    assert label_of("AQLM", "convert", "tuned") == "Check and save the tuned model"


def test_a_job_of_one_model_names_none_of_them():
    assert label_of("AQLM", "convert") == label_of("AQLM", "publish") == "Check and save the calibrated model"
    assert label_of("Native", "publish", "w4") == label_of("Native", "save") == "Save the model"
    assert label_of("Native", "tune") is None and label_of("Native", "") is None


def test_the_time_of_a_line_is_that_of_all_its_parts():
    stages = {stage.label: stage for stage in shown_stages("AQLM")}
    calibrated, tuned = (stages[f"Check and save the {name} model"] for name in ("calibrated", "tuned"))
    timings = {
        "convert": {"wall_s": 5.0, "configurations": {"calibrated": {"wall_s": 2.0}, "tuned": {"wall_s": 3.0}}},
        "publish": {"wall_s": 0.5, "configurations": {"calibrated": {"wall_s": 0.5}}},
    }
    assert (seconds(calibrated, timings), seconds(tuned, timings)) == (2.5, 3.0)
    alone = {"convert": {"wall_s": 2.0}, "publish": {"wall_s": 0.5}}
    assert (seconds(calibrated, alone), seconds(tuned, alone)) == (2.5, None)
    save = next(stage for stage in shown_stages("Native") if stage.label == "Save the model")
    assert seconds(save, {"save": {"wall_s": 1.0}, "publish": {"wall_s": 0.5}}) == 1.5


def test_a_tensorrt_jobs_events_are_all_of_a_shown_stage():
    events = [
        ("download", ""), ("calibrate", "fp8"), ("quantize", "fp8"), ("save", "fp8"), ("publish", "fp8"),
        ("evaluate_baseline", ""), ("evaluate_quantized", "fp8"), ("evaluate_fidelity", "fp8"), ("trtllm_build", "fp8"),
        ("trtllm_bench", "fp8"), ("trtllm_perplexity", "fp8"), ("benchmark", "fp8"), ("report", ""),
    ]  # fmt: skip
    places = [index_of("TensorRTLLM", *event) for event in events]
    assert places == sorted(places) and places[0] == 0 and places[-1] == len(shown_stages("TensorRTLLM")) - 1
    assert label_of("TensorRTLLM", "trtllm_bench", "") == "Build and run in TensorRT-LLM"
