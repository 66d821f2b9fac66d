"""AQLM's section: the guide's file to the letter, three sections inside a section, every refusal at its key."""

import pytest

from backend.engines.aqlm_plan import finetune_settings, search_settings, tune_settings
from backend.errors import ConfigErrors
from backend.quantize.aqlm.presets import PRESETS
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.schema import AQLMSettings, describe, parse_yaml, sections
from backend.schema.aqlm_finetune import FinetuneConfig
from tests.conftest import EXAMPLES, demo_text

GUIDE = (EXAMPLES / "aqlm_guide.yaml").read_text(encoding="utf-8")
SPECS = {".".join((*path, spec.key)): spec for path, model in sections(AQLMSettings) for spec in describe(model)}
TRUSTING = "llm.AQLM.{}_config.trust_remote_code"


def job(section, **more):
    return parse_yaml(demo_text(ALGORITHM="AQLM", llm={"AQLM": {**section}}, **{"CALIBRATION": None, **more}))


def settings_of(section, **more):
    return job(section, **more).config.algorithm_settings


def problem_of(section, **more):
    with pytest.raises(ConfigErrors) as caught:
        settings_of(section, **more)
    (error,) = caught.value.errors
    return error.key, error.detail


def small(**calibration):
    """A section of few sequences, so that the last of the demo's rules hold."""
    return {"calibration_config": calibration}


def test_the_guides_file_is_valid_and_comes_back_byte_for_byte():
    document = parse_yaml(GUIDE)
    settings = document.config.algorithm_settings
    assert settings.scheme("cpu") == AdditiveScheme(1, 16, 8) == settings.scheme("Some GPU")
    assert (document.config.calibration.SAMPLES, document.config.calibration.SEQUENCE_LENGTH) == (2048, 4096)
    assert settings.tunes and settings.EFFORT == "default" and not settings.FINETUNE_DATA.is_own
    assert document.dump() == GUIDE


def test_the_guides_values_are_the_defaults():
    """What the guide says and the default are the same, but for what is decided by device, model or effort."""
    given = parse_yaml(GUIDE).values["llm"]["AQLM"]
    differ = set()
    for key, spec in SPECS.items():
        value = given
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None and value != spec.default:
            differ.add(key)
    assert differ == {
        "save_intermediate_results", "calibration_config.num_codebooks", "calibration_config.nbits_per_codebook",
        "calibration_config.dtype", "calibration_config.local_batch_size", "calibration_config.trust_remote_code",
        "conversion_config.trust_remote_code", "finetune_config.trust_remote_code", "finetune_config.block_type",
        "finetune_config.microbatch_size", "finetune_config.skip_grouping",
        "finetune_config.verbose_optimizer",
    }  # fmt: skip


def test_every_parameter_of_the_guide_is_known_and_keys_without_effect_say_so():
    section = parse_yaml(GUIDE).values["llm"]["AQLM"]
    assert len(section["calibration_config"]) == 42 and len(section["finetune_config"]) == 53
    warnings = parse_yaml(GUIDE).warnings
    assert not [warning for warning in warnings if "unknown key" in warning]
    assert "tuning uses them all" in warnings[0]
    assert all(TRUSTING.format(name) in warnings[1] for name in ("calibration", "conversion", "finetune"))
    assert "has no effect" in warnings[1] and "TRUST_REMOTE_CODE: true at the top" in warnings[1]
    ignored = {key for key, spec in SPECS.items() if spec.ignored}
    assert {
        "calibration_config.on_save", "calibration_config.use_faiss", "calibration_config.trust_remote_code",
        "calibration_config.finetune_keep_best", "calibration_config.wandb", "overwrite",
        "finetune_config.code_selection_temperature", "finetune_config.skip_grouping", "finetune_config.wandb",
        "finetune_config.monkeypatch_old_pickle", "conversion_config.code_dtype",
    } <= ignored  # fmt: skip


def test_every_group_of_the_form_has_settings_and_every_setting_a_group():
    groups = {(group.section, group.ignored) for group in AQLMSettings.GROUPS}
    assert groups == {(spec.section, spec.ignored) for spec in SPECS.values()}
    assert all(SPECS[key].label != SPECS[other].label or SPECS[key].section != SPECS[other].section
               for key in SPECS for other in SPECS if key < other)  # fmt: skip


def test_a_value_inside_a_section_is_changed_alone():
    document = parse_yaml(GUIDE)
    document.set(("llm", "AQLM", "calibration_config", "nsamples"), 512)
    document.set(("llm", "AQLM", "FINETUNE_DATA", "PRESET"), "gsm8k_restructured")
    text = document.dump()
    before = {line.rstrip() for line in GUIDE.splitlines()}
    changed = [line for line in text.splitlines() if line.rstrip() not in before]
    added = ["      nsamples: 512", "    FINETUNE_DATA:", '      PRESET: "gsm8k_restructured"']
    assert changed == added
    assert text.count("true") == GUIDE.count("true") and text.count("#") == GUIDE.count("#")
    again = parse_yaml(text).config
    assert again.calibration.SAMPLES == 512 and again.algorithm_settings.FINETUNE_DATA.is_own


def test_unknown_keys_inside_a_section_are_named():
    section = {"calibration_config": {"beam_sizes": 2}, "FINETUNE_DATA": {"SAMPLE": 4}}
    assert job(section).warnings == [
        "llm.AQLM.calibration_config.beam_sizes: unknown key, kept in the file without effect; did you mean beam_size?",
        "llm.AQLM.FINETUNE_DATA.SAMPLE: unknown key, kept in the file without effect; did you mean SAMPLES?",
    ]


@pytest.mark.parametrize(
    ("given", "device", "scheme"),
    [
        ({}, "cpu", (2, 8)),
        ({}, "cuda:0", (1, 16)),
        ({"num_codebooks": 1}, "cpu", (1, 16)),
        ({"num_codebooks": 4}, "cuda:0", (4, 8)),
        ({"nbits_per_codebook": 8}, "cuda:0", (2, 8)),
        ({"nbits_per_codebook": 12}, "cpu", (1, 12)),
        ({"num_codebooks": 2, "nbits_per_codebook": 6}, "cpu", (2, 6)),
    ],
)
def test_codebooks_that_the_file_leaves_open_are_decided_by_the_device(given, device, scheme):
    assert settings_of(small(**given)).scheme(device) == AdditiveScheme(*scheme, 8)


def test_calibration_counts_more_than_the_sections_own_size():
    section = small(nsamples=64, model_seqlen=128, val_size=8, seed=5)
    own = job(section).config.calibration
    assert (own.SAMPLES, own.SEQUENCE_LENGTH, own.SEED, own.SHUFFLE) == (64, 128, 5, False)
    both = job(section, CALIBRATION={"SAMPLES": 32, "SHUFFLE": True}).config.calibration
    assert (both.SAMPLES, both.SEQUENCE_LENGTH, both.SEED, both.SHUFFLE) == (32, 128, 5, True)
    other = parse_yaml(demo_text(CALIBRATION=None, llm={"AQLM": section})).config  # of AutoAWQ
    assert (other.calibration.SAMPLES, other.calibration.SEQUENCE_LENGTH) == (128, 512)


def test_no_epochs_or_nothing_to_update_is_no_tuning():
    assert settings_of({}).tunes
    assert not settings_of({"finetune_config": {"max_epochs": 0}}).tunes
    nothing = {key: False for key in ("update_codes", "update_codebooks_and_scales", "update_non_quantized_parameters")}
    assert not settings_of({"finetune_config": {"max_epochs": 0, **nothing}}).tunes
    key, says = problem_of({"finetune_config": nothing})
    assert key == "llm.AQLM.finetune_config.update_codes" and "nothing would be tuned" in says


@pytest.mark.parametrize(
    ("section", "key", "says"),
    [
        (small(on_save="import os"), "calibration_config.on_save", "found 'import os'; a job file runs no code"),
        (small(out_group_size=2), "calibration_config.out_group_size", "found 2; a checkpoint that transformers loads"),
        (small(scale_nbits=4), "calibration_config.scale_nbits", "allowed is 0"),
        (small(codebook_value_nbits=8), "calibration_config.codebook_value_nbits", "found 8"),
        (small(codebook_value_num_groups=2), "calibration_config.codebook_value_num_groups", "allowed is 1"),
        (small(no_quant=True), "calibration_config.no_quant", "python -m backend evaluate"),
        (small(mix_compression=True), "calibration_config.mix_compression", "experts"),
        (
            small(nbits_per_codebook=2, beam_size=5),
            "calibration_config.beam_size",
            "found 5; a codebook of 2 bits has 4",
        ),
        (small(nbits_per_codebook=17), "calibration_config.nbits_per_codebook", "at most 16"),
        (small(nsamples=1), "calibration_config.nsamples", "at least 2"),
        (small(nsamples="many"), "calibration_config.nsamples", "a whole number"),
        (
            small(local_batch_size=3),
            "calibration_config.local_batch_size",
            "found 3, which does not divide finetune_bat",
        ),
        (small(nsamples=256), "calibration_config.val_size", "found 256, and 256 sequences are read in all"),
        (small(nsamples=16, val_size=40), "calibration_config.val_size", "allowed are 0 to 15"),
        (small(lr=0), "calibration_config.lr", "at least 1e-09"),
        (small(relative_mse_tolerance=2), "calibration_config.relative_mse_tolerance", "at most 0.99"),
        (small(trust_remote_code="yes"), "calibration_config.trust_remote_code", "True or False"),
        ({"conversion_config": {"code_dtype": "float"}}, "conversion_config.code_dtype", "'uint8', 'int8'"),
        ({"conversion_config": 3}, "conversion_config", "a section"),
        ({"finetune_config": {"monkeypatch_old_pickle": True}}, "finetune_config.monkeypatch_old_pickle", "pickles"),
        ({"finetune_config": {"microbatch_size": 3}}, "finetune_config.microbatch_size", "divide batch_size 128"),
        ({"finetune_config": {"max_code_change_per_step": 0}}, "finetune_config.max_code_change_per_step", "at least"),
        (
            {"finetune_config": {"max_epochs": 2, "P_ONLY_EPOCHS": 3}},
            "finetune_config.P_ONLY_EPOCHS",
            "allowed are 0 to 2",
        ),
        ({"finetune_config": {"delta_decay": 1.5}}, "finetune_config.delta_decay", "at most 1.0"),
        (
            {**small(nbits_per_codebook=2), "finetune_config": {"beam_size": 5}},
            "finetune_config.beam_size",
            "allowed are 1 to 4",
        ),
        (
            {**small(nbits_per_codebook=16), "finetune_config": {"code_dtype": "int16"}},
            "finetune_config.code_dtype",
            "does not hold codes of 16 bits; allowed are uint16, int32, int64",
        ),
        ({"EFFORT": "more"}, "EFFORT", "'fast', 'default', 'thorough' or 'reference'"),
        ({"dtype": "float8"}, "dtype", "'float16' or 'bfloat16'"),
        ({"FINETUNE_DATA": {"PRESET": "gsm8k"}}, "FINETUNE_DATA.PRESET", "'gsm8k_restructured'"),
        (
            {"FINETUNE_DATA": {"PRESET": "gsm8k_restructured", "DATASET_NAME": "a/b"}},
            "FINETUNE_DATA.PRESET",
            "give one of them",
        ),
        ({"FINETUNE_DATA": {"TEXT_COLUMN": "a, b"}}, "FINETUNE_DATA.FORMAT_STRING", "need a format string"),
        ({"FINETUNE_DATA": {"FORMAT_STRING": "{b}"}}, "FINETUNE_DATA.FORMAT_STRING", "{b} is not among TEXT_COLUMN"),
        ({"FINETUNE_DATA": {"SAMPLES": 1}}, "FINETUNE_DATA.SAMPLES", "at least 2"),
    ],
)
def test_what_cannot_be_is_refused_at_its_key(section, key, says):
    found, detail = problem_of(section)
    assert found == f"llm.AQLM.{key}" and says in detail


def test_the_validation_is_measured_against_what_is_really_read():
    key, says = problem_of({}, CALIBRATION={"SAMPLES": 64})
    assert key == "llm.AQLM.calibration_config.val_size" and "64 sequences are read in all" in says


def test_a_batch_is_shared_evenly_by_the_gpus():
    assert settings_of({"finetune_config": {"microbatch_size": 2}}, CUDA_ID="0,1,2,3").tunes
    key, says = problem_of({"finetune_config": {"batch_size": 128, "microbatch_size": 4}}, CUDA_ID="0,1,2")
    assert key == "llm.AQLM.finetune_config.batch_size"
    assert "found 128; it has to be a multiple of 12: microbatch_size 4 on each of the 3 GPUs" in says
    assert says.endswith("use 132")


def test_several_gpus_share_weights_in_float32():
    section = {"finetune_config": {"master_dtype": "bfloat16", "microbatch_size": 2}}
    assert settings_of(section).tunes
    key, says = problem_of(section, CUDA_ID="0,1")
    assert key == "llm.AQLM.finetune_config.master_dtype" and "found 'bfloat16' beside 2 GPUs" in says


def test_what_tuning_is_told_is_what_the_file_says():
    ours = {"CODEBOOK_LR": 0.002, "P_ONLY_EPOCHS": 1, "LR_SCHEDULE": "cosine", "WARMUP_STEPS": 3, "EARLY_STOP": 4}
    told = tune_settings(settings_of({"finetune_config": {**ours, "lr": 0.5, "amp_dtype": "auto", "seed": 7}}))
    assert all(getattr(told, key.lower()) == value for key, value in ours.items())
    assert (told.lr, told.seed, told.amp_dtype, told.code_trust_ratio) == (0.5, 7, None, 0.01)
    given = tune_settings(parse_yaml(GUIDE).config.algorithm_settings).to_dict()
    section = parse_yaml(GUIDE).values["llm"]["AQLM"]["finetune_config"]
    shared = given.keys() & section.keys()
    assert len(shared) > 25 and {key: given[key] for key in shared} == {key: section[key] for key in shared}
    known = set(FinetuneConfig.model_fields) | {key.lower() for key in FinetuneConfig.model_fields}
    assert set(given) <= known, "a parameter of tuning that no key of the file sets"


def test_only_the_reference_procedure_reads_the_guides_search_parameters():
    own = {"beam_size": 3, "max_epochs": 7, "lr": 0.5, "init_max_points_per_centroid": 9, "relative_mse_tolerance": 0}
    assert search_settings(settings_of(small(**own))) == PRESETS["default"]
    told = search_settings(settings_of({"EFFORT": "reference", **small(**own)}))
    assert (told.beam_size, told.max_epochs, told.lr, told.init_max_points_per_centroid) == (3, 7, 0.5, 9)
    assert told.relative_mse_tolerance is None and told.procedure == "reference"
    guide = parse_yaml(GUIDE.replace("    dtype:", "    EFFORT: reference\n    dtype:", 1)).config.algorithm_settings
    assert search_settings(guide) == PRESETS["reference"]


def test_block_finetuning_is_told_what_the_file_says():
    told = finetune_settings(parse_yaml(GUIDE).config.algorithm_settings)
    assert (told.max_epochs, told.lr, told.beta2, told.batch_size, told.local_batch_size) == (25, 1e-4, 0.999, 256, 4)
    assert finetune_settings(settings_of(small(finetune_max_epochs=0))) is None


def test_the_guides_switch_for_remote_code_is_taken_and_others_are_not():
    for value in (True, False):
        settings_of(small(trust_remote_code=value))
    for path in ({"AQLM": {"trust_remote_code": True}}, {"AQLM": {"FINETUNE_DATA": {"trust_remote_code": True}}}):
        with pytest.raises(ConfigErrors, match="only with TRUST_REMOTE_CODE: true at the top"):
            _ = parse_yaml(demo_text(ALGORITHM="AQLM", llm=path)).config
    warned = job(small(trust_remote_code=True)).warnings
    assert len(warned) == 1 and warned[0].startswith(TRUSTING.format("calibration") + ": has no effect")
    assert job(small(trust_remote_code=True), TRUST_REMOTE_CODE=True).warnings == []


def test_other_algorithms_do_not_read_the_section():
    assert parse_yaml(demo_text(llm={"AQLM": {"EFFORT": 99}})).config.llm.AQLM is None
