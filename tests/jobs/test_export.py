"""Exported settings are read by the programs they are meant for."""

import subprocess

from backend.jobs.export import export_text
from backend.schema import parse_yaml
from tests.conftest import demo_text


def test_yaml_is_the_file_as_submitted(guide_text):
    assert export_text(guide_text, "yaml") == guide_text


def test_nyuntam_gets_no_sections_of_our_own(guide_text):
    assert export_text(guide_text, "nyuntam") == guide_text
    exported = parse_yaml(export_text(demo_text("x"), "nyuntam"))
    assert not {"CALIBRATION", "EVALUATION", "BENCHMARK"} & set(exported.values)
    assert exported.values["CUDA_ID"] == "0" and exported.config.JOB_ID == "x"


def test_the_command_writes_the_same_file(guide_text, tmp_path):
    command = export_text(guide_text, "command")
    script, run = command.rsplit("\n", 2)[0], command.splitlines()[-1]
    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True)
    assert (tmp_path / "awq_quantization.yaml").read_text().strip() == guide_text.strip()
    assert run == "python -m backend run awq_quantization.yaml"


def test_llmcompressor_reads_its_recipe(guide_text):
    from llmcompressor.recipe import Recipe

    recipe = Recipe.create_instance(export_text(guide_text, "llmcompressor"))
    names = [type(m).__name__ for m in recipe.modifiers]
    assert "QuantizationModifier" in names and any("AWQ" in name or "Smooth" in name for name in names)
    (rounding,) = [m for m in recipe.modifiers if type(m).__name__ == "QuantizationModifier"]
    weights = rounding.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (4, 128, False)
    assert rounding.ignore == ["lm_head"]
