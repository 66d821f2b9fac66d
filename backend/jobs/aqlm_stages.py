"""How an AQLM job's models come to be: calibrate, check, save; then tune, check, save.

The calibrated model is published before tuning begins, so nothing that fails later can lose it; tuning reads it from
there. A job whose tuning fails keeps and measures the calibrated model.
"""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from backend.engines.aqlm_plan import TEXT_FOLDER
from backend.engines.configurations import Configuration
from backend.engines.registry import engine_for
from backend.evaluate.cache import digest
from backend.evaluate.metrics import versions
from backend.jobs import models
from backend.jobs.devices import gpu_numbers, torch_device
from backend.jobs.models import Making
from backend.jobs.program import Command
from backend.jobs.run import Run
from backend.jobs.stage import Stage
from backend.schema import AQLMSettings

CALIBRATE = "backend.engines.aqlm_calibrate"
CONVERT = "backend.engines.aqlm_convert"
TUNE = "backend.engines.aqlm_tune"


def stages(run: Run) -> list[Stage]:
    """The stages that make and save the calibrated and, if the job tunes, the tuned model."""
    calibrated, *tuned = makings(run)
    made = [
        Stage(
            "calibrate",
            "Calibrate",
            _calibrate,
            _note_calibrate,
            calibrate_key,
            calibrated.is_there,
            makes_models=True,
            writes=partial(_models_to_write, configuration=calibrated.configuration),
        ),  # fmt: skip
        *_checked(calibrated),
    ]
    for making in tuned:
        if _settings(run).save_intermediate_results:
            made.append(Stage("publish_text", "Save the tuning text", finish=_publish_text))
        made.append(
            Stage(
                "tune", "Tune", partial(_tune, making=making), key=making.key, intact=making.is_there,
                configuration=making.configuration, makes_models=True, may_fail=True,
                writes=partial(_models_to_write, configuration=making.configuration),
            )
        )  # fmt: skip
        made += _checked(making, may_fail=True)
    return made


def makings(run: Run) -> list[Making]:
    """How each of the models comes to be; the calibrated one first."""
    calibrated, *tuned = run.configurations
    return [
        Making(calibrated, calibrate_key, _told_of_calibrated),
        *(Making(one, partial(tune_key, configuration=one), _told_of_tuned) for one in tuned),
    ]


def _checked(making: Making, *, may_fail: bool = False) -> list[Stage]:
    """Read a model back with the aqlm package, and save it if its answers are the same."""
    convert = Stage(
        "convert", "Check the checkpoint", partial(_convert, making=making), key=partial(_convert_key, making=making),
        configuration=making.configuration, makes_models=True, may_fail=may_fail,
    )  # fmt: skip
    return [convert, making.publish_stage(may_fail=may_fail)]


def _settings(run: Run) -> AQLMSettings:
    settings = run.config.algorithm_settings
    assert isinstance(settings, AQLMSettings)
    return settings


def _models_to_write(run: Run, configuration: Configuration) -> tuple[Path, int]:
    return models.bytes_to_write(run, [configuration])


# -- calibrated


def calibrate_key(run: Run) -> str:
    """Content key of the calibrated model."""
    inputs = run.stage_result("inputs")
    return digest(
        {
            "engine": "aqlm",
            "configuration": run.configurations[0].request,
            "seed": run.config.calibration.SEED,
            "device": run.job.device,
            "inputs": {name: inputs[name] for name in ("model", "tokens")},
            "versions": versions("torch", "transformers"),
        }
    )


def _calibrate(run: Run) -> Command:
    engine_for(run.config)
    for making in makings(run):
        making.check_place(run)
    configuration = run.configurations[0]
    checkpoint, out = run.checkpoint_dir / "calibrate", models.staged(run, configuration)
    models.prepare_folders(run, "calibrate", calibrate_key(run), outputs=[out], checkpoint=checkpoint)
    inputs = run.stage_result("download")
    request = {
        "model_dir": inputs["model_dir"],
        "tokens_file": inputs["tokens_file"],
        "out_dir": str(out),
        "device": torch_device(run.job.device),
        "checkpoint_dir": str(checkpoint),
        "seed": run.config.calibration.SEED,
        "configuration": configuration.request,
    }
    return run.program("calibrate", CALIBRATE, request)


def _note_calibrate(run: Run) -> None:
    # The program times its own stages, which the runner can only see as one process.
    run.timings.pop("calibrate", None)
    run.timings.update(run.stage_result("calibrate")["timings"])


def _told_of_calibrated(run: Run) -> dict[str, Any]:
    return run.stage_result("calibrate")


# -- tuned


def tune_key(run: Run, configuration: Configuration) -> str:
    """Content key of the tuned model."""
    return digest(
        {
            "calibrated": calibrate_key(run),
            "configuration": configuration.request,
            "text": run.stage_result("inputs")["tuning"],
            "device": run.job.device,
            "versions": versions("torch", "transformers"),
        }
    )


def _tune(run: Run, making: Making) -> Command:
    configuration, calibrated = making.configuration, run.configurations[0]
    making.check_place(run)
    checkpoint, out = run.checkpoint_dir / "tune", models.staged(run, configuration)
    models.prepare_folders(run, "tune", making.key(run), outputs=[out], checkpoint=checkpoint)
    inputs, processes = run.stage_result("download"), max(1, len(gpu_numbers(run.job.device)))
    request = {
        "model_dir": inputs["model_dir"],
        "quantized_dir": str(run.target(calibrated)),
        "tuning_file": inputs["tuning_file"],
        "out_dir": str(out),
        "device": "cuda" if processes > 1 else torch_device(run.job.device),
        "processes": processes,
        "checkpoint_dir": str(checkpoint),
        "configuration": configuration.request,
    }
    return run.program(f"tune.{configuration.name}", TUNE, request)


def _told_of_tuned(run: Run) -> dict[str, Any]:
    calibrated, tuned = run.stage_result("calibrate"), run.stage_result(f"tune.{run.configurations[1].name}")
    return {
        "layers": [],
        "skipped": calibrated["skipped"],
        "tokens": calibrated["tokens"],
        "notes": tuned["notes"],
        "tuning": {key: value for key, value in tuned.items() if key != "notes"},
    }


def _publish_text(run: Run) -> None:
    """Save the tokens of the tuning text where the guide has them."""
    inputs = run.stage_result("download")
    target = run.home.artefact_dir(run.config) / TEXT_FOLDER
    key = digest(["tuning text", run.stage_result("inputs")["tuning"]])
    source = run.staging / "tokenized_dataset"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    shutil.copyfile(inputs["tuning_file"], source / "tokens.safetensors")
    models.publish_folder(run, source, target, models.facts_of(run, key))


# -- checks


def _convert(run: Run, making: Making) -> Command:
    configuration = making.configuration
    folder = models.staged(run, configuration)
    request = {
        "folder": str(folder if folder.is_dir() else run.target(configuration)),
        **({"configuration": configuration.name} if run.several else {}),
    }
    return run.program(f"convert.{configuration.name}", CONVERT, request)


def _convert_key(run: Run, making: Making) -> str:
    return digest(["convert", making.key(run), versions("torch", "transformers", "aqlm")])
