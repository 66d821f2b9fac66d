"""Exported settings are read by the programs they are meant for."""

import subprocess

import pytest

from backend.engines.configurations import configurations
from backend.engines.llm_recipes import modifiers
from backend.errors import ConfigError
from backend.jobs.export import export_text
from backend.schema import parse_yaml
from backend.schema.llmcompressor import FREE_GROUP_RECIPES, INTEGER_WEIGHTS, RECIPES
from tests.conftest import EXAMPLES, demo_text
from tests.jobs.aqlm_jobs import aqlm_text


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


def modifiers_of(text):
    from llmcompressor.recipe import Recipe

    return Recipe.create_instance(export_text(text, "llmcompressor")).modifiers


def job(algorithm, section):
    return demo_text(ALGORITHM=algorithm, llm={algorithm: section})


@pytest.mark.parametrize("engine", ["native", "autoawq"])
def test_llmcompressor_reads_the_guides_recipe(guide_text, engine):
    text = guide_text.replace('VERSION: "GEMV"', f'VERSION: "GEMV"\n    ENGINE: {engine}')
    scaling, rounding = modifiers_of(text)
    assert (type(scaling).__name__, type(rounding).__name__) == ("AWQModifier", "QuantizationModifier")
    weights = rounding.config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (4, 128, False)
    assert rounding.ignore == ["lm_head"]


@pytest.mark.parametrize(
    ("method", "names"),
    [
        ("RTN", ["QuantizationModifier"]),
        ("AWQ", ["AWQModifier", "QuantizationModifier"]),
        ("GPTQ", ["GPTQModifier"]),
        ("AWQ+GPTQ", ["AWQModifier", "GPTQModifier"]),
    ],
)
def test_llmcompressor_reads_the_cores_methods(method, names):
    section = {"METHOD": method, "W_BIT": 3, "Q_GROUP_SIZE": -1, "SYMMETRIC": True, "DAMP": 0.05, "ACT_ORDER": False}
    found = modifiers_of(job("Native", section))
    assert [type(m).__name__ for m in found] == names
    weights = found[-1].config_groups["group_0"].weights
    assert (weights.num_bits, weights.strategy, weights.symmetric) == (3, "channel", True)
    if "GPTQ" in method:
        assert (found[-1].dampening_frac, found[-1].actorder) == (0.05, None)


def schemes_by_name(found, names):
    """Bits that each Linear gets from the modifiers, as compressed-tensors resolves them; None: stays as it is."""
    import torch
    from compressed_tensors.utils.match import is_match, match_targets

    linear, bits = torch.nn.Linear(2, 2), dict.fromkeys(names)
    for modifier in found:
        groups = {t: g for g in (modifier.config_groups or {}).values() for t in g.targets}
        for name in names:
            if is_match(name, linear, groups, modifier.ignore):
                target = match_targets(name, linear, groups)[0]
                assert bits[name] is None, "two modifiers would round the same Linear"
                bits[name] = (type(modifier).__name__[:4], groups[target].weights.num_bits)
    return bits


def test_exceptions_reach_the_same_linears():
    section = {
        "METHOD": "GPTQ", "W_BIT": 3, "KEEP": ["lm_head", "o_proj"],
        "OVERRIDES": [
            {"PATTERN": "model.layers.0.*", "W_BIT": 8},
            {"PATTERN": "*.down_proj", "KEEP": True},
            {"PATTERN": "*.up_proj", "METHOD": "RTN", "W_BIT": 4},
        ],
    }  # fmt: skip
    names = [f"model.layers.{i}.{n}" for i in (0, 1, 10) for n in ("q_proj", "o_proj", "down_proj", "up_proj")]
    found = schemes_by_name(modifiers_of(job("Native", section)), [*names, "lm_head"])
    (planned,) = configurations(parse_yaml(job("Native", section)).config)
    for name in names:
        scheme = planned.recipe.scheme_for(name, 128)
        wanted = None if isinstance(scheme, str) else ("GPTQ" if scheme.feeds_back else "Quan", scheme.bits)
        assert found[name] == wanted, name
    assert found["lm_head"] is None and found["model.layers.0.down_proj"] == ("GPTQ", 8)


RECIPE_CASES = [
    (recipe, scheme, group_size)
    for recipe, facts in RECIPES.items()
    for scheme in facts.schemes
    for group_size in (None, 64, -1)
    if group_size is None or (recipe in FREE_GROUP_RECIPES and scheme in INTEGER_WEIGHTS)
]


@pytest.fixture(scope="module")
def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))


@pytest.mark.parametrize(("recipe", "scheme", "group_size"), RECIPE_CASES)
def test_llmcompressor_reads_what_its_engine_would_run(tiny_llama, recipe, scheme, group_size):
    section = {"RECIPE": recipe, "SCHEME": scheme, "GROUP_SIZE": group_size, "ACTORDER": "none"}
    from compressed_tensors.utils.match import match_targets

    text = job("LLMCompressor", section)
    wanted = modifiers(parse_yaml(text).config.algorithm_settings, tiny_llama)
    found = modifiers_of(text)
    assert [type(m) for m in found] == [type(m) for m in wanted]
    for one, other in zip(found, wanted, strict=True):
        skip = {"index", "group", "config_groups"}
        if hasattr(one, "sparsity"):
            # The engine names each Linear, for lack of a way to ignore some; a file has no model to name them from.
            skip |= {"targets", "ignore"}
            assert match_targets("lm_head.", tiny_llama.lm_head, one.ignore)
            assert not match_targets("model.layers.0.mlp.up_proj.", tiny_llama.lm_head, one.ignore)
        assert one.model_dump(exclude=skip) == other.model_dump(exclude=skip)
        if hasattr(one, "resolve_quantization_config"):
            resolved = [m.resolve_quantization_config().model_dump() for m in (one, other)]
            assert resolved[0] == resolved[1]


@pytest.mark.parametrize(
    ("algorithm", "section", "target", "key", "says"),
    [
        ("AutoAWQ", {"W_BIT": [4, 3]}, "nyuntam", "llm.AutoAWQ.W_BIT", "found 4, 3; the original system makes one"),
        ("AutoAWQ", {"W_BIT": 3}, "nyuntam", "llm.AutoAWQ.W_BIT", "set it to 4"),
        ("AutoAWQ", {"Q_GROUP_SIZE": [64, 32]}, "nyuntam", "llm.AutoAWQ.Q_GROUP_SIZE", "one of 128, 64 and 32"),
        ("Native", {}, "nyuntam", "ALGORITHM", "does not have"),
        ("Native", {"W_BIT": [4, 3]}, "llmcompressor", "llm.Native", "2 results (gptq-w4-g128, gptq-w3-g128)"),
        (
            "Native",
            {"OVERRIDES": [{"PATTERN": "*.q_proj", "METHOD": "AWQ"}]},
            "llmcompressor",
            "llm.Native.OVERRIDES",
            "AWQModifier scales them all",
        ),
    ],
)
def test_what_a_target_cannot_do_is_refused_at_its_key(algorithm, section, target, key, says):
    with pytest.raises(ConfigError) as caught:
        export_text(job(algorithm, section), target)
    assert caught.value.key == key and says in caught.value.detail


def test_nyuntam_gets_no_keys_of_our_own():
    text = job("AutoAWQ", {"ZERO_POINT": True, "W_BIT": [4], "ENGINE": "native", "FORMAT": "auto"})
    section = parse_yaml(export_text(text, "nyuntam")).values["llm"]["AutoAWQ"]
    assert section == {"ZERO_POINT": True, "W_BIT": 4}


def test_the_original_system_gets_its_aqlm_without_what_is_ours():
    text = aqlm_text("job", FINETUNE_DATA={"PRESET": "gsm8k_restructured"}, CALIBRATION={"SAMPLES": 64, "SEED": 3})
    found = parse_yaml(export_text(text, "nyuntam")).values
    section = found["llm"]["AQLM"]
    assert set(section) == {"save_intermediate_results", "calibration_config", "finetune_config"}
    assert (section["calibration_config"]["nsamples"], section["calibration_config"]["seed"]) == (64, 3)
    assert section["calibration_config"]["model_seqlen"] == 32
    assert not {"CALIBRATION", "EVALUATION", "BENCHMARK"} & set(found)
    guide = (EXAMPLES / "aqlm_guide.yaml").read_text(encoding="utf-8")
    assert export_text(guide, "nyuntam") == guide


def test_llm_compressor_has_no_aqlm():
    with pytest.raises(ConfigError, match="llm-compressor does not have") as caught:
        export_text(aqlm_text("job"), "llmcompressor")
    assert caught.value.key == "ALGORITHM"
