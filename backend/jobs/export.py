"""A job's settings in the forms that other people and programs use."""

from __future__ import annotations

import io
import shlex
from typing import Any

from ruamel.yaml import YAML

from backend.schema import SECTIONS, parse_yaml

TARGETS = ("yaml", "nyuntam", "llmcompressor", "command")


def export_text(config_yaml: str, target: str) -> str:
    """Write a job's settings for a target.

    Args:
        config_yaml: The job file.
        target: `yaml` (the file as it was submitted), `nyuntam` (without Quantdeck's own sections, which the
            original system would take for algorithm arguments), `llmcompressor` (a recipe with the nearest
            equivalent) or `command` (a shell command that runs the same job).

    Raises:
        ConfigErrors: If the file is not valid.
    """
    document = parse_yaml(config_yaml)
    config = document.config
    if target == "yaml":
        return document.dump()
    if target == "command":
        return (
            f"cat > {shlex.quote(config.JOB_ID)}.yaml <<'YAML'\n{document.dump().rstrip()}\nYAML\n"
            f"python -m backend run {shlex.quote(config.JOB_ID)}.yaml\n"
        )
    if target == "nyuntam":
        for section in SECTIONS:
            document.remove((section,))
        return document.dump()
    return _llmcompressor_recipe(config.algorithm_settings.model_dump())


def _llmcompressor_recipe(settings: dict[str, Any]) -> str:
    """An llm-compressor recipe: AWQ scales, then rounding to the same bits, groups and symmetry."""
    recipe = {
        "quant_stage": {
            "quant_modifiers": {
                "AWQModifier": {},
                "QuantizationModifier": {
                    "ignore": ["lm_head"],
                    "config_groups": {
                        "group_0": {
                            "targets": ["Linear"],
                            "weights": {
                                "num_bits": settings["W_BIT"],
                                "type": "int",
                                "symmetric": not settings["ZERO_POINT"],
                                "strategy": "group",
                                "group_size": settings["Q_GROUP_SIZE"],
                            },
                        }
                    },
                },
            }
        }
    }
    stream = io.StringIO()
    YAML(typ="safe", pure=True).dump(recipe, stream)
    return stream.getvalue()
