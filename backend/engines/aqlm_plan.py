"""What AQLM's programs are asked for: from the section of the job file to the parameters of search and tuning.

Imports no torch: pages and checks before the start read plans too.
"""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from typing import Any

from backend.formats.layouts import AQLM
from backend.quantize.aqlm.finetune_settings import FinetuneSettings
from backend.quantize.aqlm.presets import PRESETS, SearchSettings
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.aqlm.tune.settings import TuneSettings
from backend.schema import AQLMSettings

CALIBRATED, TUNED = "calibrated", "tuned"
FOLDERS = {CALIBRATED: "tmp/caliberation", TUNED: "tmp/converted"}
"""Where the guide has its results, below the job's folder; the spelling is the guide's."""
TEXT_FOLDER = "tmp/tokenized_dataset"
REFERENCE, AUTO = "reference", "auto"


def aqlm_requests(settings: AQLMSettings, device: str) -> list[tuple[str, str, dict[str, Any]]]:
    """The results that a job makes.

    Args:
        settings: The section.
        device: Where the job runs.

    Returns:
        Per result its name, its folder below the job's, and as JSON values `name`, `label`, `scheme`, `layout`, `dtype`
        (of what has no codes), and: calibrated `search`, `finetune` (or None), `val_size`, `compute_dtype`,
        `true_sequential`; tuned `tune`.
    """
    scheme, blocks = settings.scheme(device), settings.calibration_config
    common = {"scheme": asdict(scheme), "layout": AQLM, "dtype": settings.dtype}
    calibrated: dict[str, Any] = {
        "name": CALIBRATED,
        "label": scheme_label(scheme),
        **common,
        "search": search_settings(settings).to_dict(),
        "finetune": finetune.to_dict() if (finetune := finetune_settings(settings)) else None,
        "val_size": blocks.val_size,
        "compute_dtype": _compute_dtype(blocks.dtype, device),
        "true_sequential": blocks.true_sequential,
    }
    tuned: dict[str, Any] = {
        "name": TUNED,
        "label": f"{scheme_label(scheme)}, tuned",
        **common,
        "tune": tune.to_dict() if (tune := tune_settings(settings)) else None,
    }
    return [(one["name"], FOLDERS[one["name"]], one) for one in ((calibrated, tuned) if tune else (calibrated,))]


def scheme_label(scheme: AdditiveScheme) -> str:
    """A scheme for people, e.g. `AQLM 2 x 8 bit, groups of 8`."""
    return f"AQLM {scheme.num_codebooks} x {scheme.nbits_per_codebook} bit, groups of {scheme.in_group_size}"


def search_settings(settings: AQLMSettings) -> SearchSettings:
    """How codes are searched: the effort's preset; of the reference procedure, the parameters of the file."""
    preset, file = PRESETS[settings.EFFORT], settings.calibration_config
    if settings.EFFORT != REFERENCE:
        return preset
    return replace(
        preset,
        lr=file.lr,
        beam_size=file.beam_size,
        max_epochs=file.max_epochs,
        steps_per_epoch=file.steps_per_epoch,
        relative_mse_tolerance=file.relative_mse_tolerance or None,
        init_max_iter=file.init_max_iter,
        init_max_points_per_centroid=file.init_max_points_per_centroid,
    )


def finetune_settings(settings: AQLMSettings) -> FinetuneSettings | None:
    """How layers are trained after their codes were found; None if they are not."""
    file = settings.calibration_config
    if not file.finetune_max_epochs:
        return None
    return FinetuneSettings(
        max_epochs=file.finetune_max_epochs,
        lr=file.finetune_lr,
        beta1=file.finetune_adam_beta1,
        beta2=file.finetune_adam_beta2,
        batch_size=file.finetune_batch_size,
        local_batch_size=file.local_batch_size,
        early_stop=file.finetune_early_stop,
        use_checkpointing=file.use_checkpointing,
    )


def tune_settings(settings: AQLMSettings) -> TuneSettings | None:
    """How the whole model is tuned; None if it is not."""
    file = settings.finetune_config
    if not file.tunes:
        return None
    given = {name.lower(): getattr(file, name) for name in type(file).model_fields}
    if given["amp_dtype"] == AUTO:
        given["amp_dtype"] = None
    return TuneSettings(**{field.name: given[field.name] for field in fields(TuneSettings) if field.name in given})


def _compute_dtype(wanted: str, device: str) -> str | None:
    """Type of the forward passes; None for the device's best. A CPU is slow in float16."""
    return None if wanted == AUTO or (wanted == "float16" and device == "cpu") else wanted
