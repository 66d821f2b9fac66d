"""What may be asked of llm-compressor: rules of the section, and what a model rules out before anything is loaded."""

from __future__ import annotations

import typing

import pytest
from pydantic import ValidationError

from backend.engines.llm_problems import check_llm, llm_problems
from backend.errors import ConfigErrors, ModelError
from backend.formats.headers import TensorInfo
from backend.schema.errors import config_errors
from backend.schema.fields import describe
from backend.schema.llm_tables import RECIPES, SCHEMES
from backend.schema.llmcompressor import LLMCompressorSettings
from tests.engines.llm_tiny import make_model


def settings(**section):
    return LLMCompressorSettings.model_validate(section)


def problem(**section):
    with pytest.raises(ValidationError) as caught:
        settings(**section)
    (error,) = config_errors(caught.value).errors
    return error.message


def test_an_empty_section_is_the_guides_recipe():
    made = settings()
    assert (made.RECIPE, made.SCHEME, made.TARGETS, made.IGNORE, made.group_size) == (
        "GPTQ", "W4A16", ["Linear"], ["lm_head"], 128,
    )  # fmt: skip
    assert made.label == "gptq-w4a16-g128"
    assert settings(GROUP_SIZE="", SCHEME=None) == made


def test_the_tables_and_the_choices_agree():
    fields = {spec.key: spec for spec in describe(LLMCompressorSettings)}
    assert tuple(fields["RECIPE"].choices) == tuple(RECIPES)
    assert set(fields["SCHEME"].choices) == set(SCHEMES)
    used = {key for facts in RECIPES.values() for key in facts.uses}
    assert used <= set(fields)
    assert {scheme for facts in RECIPES.values() for scheme in facts.schemes} == set(SCHEMES)
    assert all(spec.help and spec.label for spec in fields.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_alone_takes_its_own_scheme(recipe):
    first, *_ = RECIPES[recipe].schemes
    assert first == settings(RECIPE=recipe).SCHEME


def test_every_pair_that_is_not_in_the_table_is_refused():
    choices = typing.get_args(LLMCompressorSettings.model_fields["SCHEME"].annotation)
    refused = [(r, s) for r, facts in RECIPES.items() for s in choices if s not in facts.schemes]
    assert len(refused) > 50
    for recipe, scheme in refused:
        message = problem(RECIPE=recipe, SCHEME=scheme)
        assert message.startswith(f"SCHEME: found '{scheme}'; RECIPE {recipe} makes")
        assert RECIPES[recipe].schemes[0] in message


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"RECIPE": "QuIP"}, "RECIPE: found 'QuIP'; allowed: 'GPTQ'"),
        ({"RECIPE": "SmoothQuant+GPTQ", "GROUP_SIZE": 64}, "GROUP_SIZE: found 64; .* leave it empty for SmoothQuant"),
        ({"GROUP_SIZE": 48}, "GROUP_SIZE: found 48; allowed: 128, 64, 32 or -1"),
        ({"RECIPE": "AWQ", "KV_CACHE_FP8": True}, "KV_CACHE_FP8: found True; .* set it to False for AWQ"),
        ({"RECIPE": "Wanda", "SPARSITY": 0.6}, "SPARSITY: found 0.6; mask 2:4 means 0.5"),
        ({"DAMPENING_FRAC": 0}, "DAMPENING_FRAC: found 0; it must be at least"),
        ({"TARGETS": []}, "TARGETS: found \\[\\]; name what is to be compressed"),
        ({"ENGINE": "native", "RECIPE": "AutoRound"}, "ENGINE: found 'native'; the native core has RTN, AWQ"),
        ({"ENGINE": "native", "SCHEME": "W8A8"}, "ENGINE: found 'native'; the native core makes W4A16.*not W8A8"),
        ({"ENGINE": "native", "KV_CACHE_FP8": True}, "ENGINE: .*no 8-bit KV cache; use ENGINE llmcompressor"),
        ({"ENGINE": "native", "TARGETS": "re:.*mlp.*"}, "ENGINE: .*compresses Linear, not re:"),
        ({"ENGINE": "native", "IGNORE": ["re:.*head"]}, "ENGINE: .*regular expressions like re:.*head"),
    ],
)
def test_what_does_not_go_together_names_the_key_and_the_way_out(section, says):
    import re

    assert re.match(says, problem(**section))


def test_names_may_stand_in_one_line():
    assert settings(IGNORE="lm_head, model.layers.0.mlp.up_proj").IGNORE == ["lm_head", "model.layers.0.mlp.up_proj"]
    assert settings(IGNORE="re:.*(a|b){1,2}").IGNORE == ["re:.*(a|b){1,2}"]


@pytest.mark.parametrize(
    ("section", "label", "text"),
    [
        ({"RECIPE": "RTN", "SCHEME": "W4A16_ASYM", "GROUP_SIZE": -1}, "rtn-w4a16-asym-channel", False),
        ({"RECIPE": "RTN", "SCHEME": "NVFP4"}, "rtn-nvfp4", True),
        ({"RECIPE": "RTN", "KV_CACHE_FP8": True}, "rtn-w4a16-g128-kvfp8", True),
        ({"RECIPE": "SparseGPT"}, "sparsegpt-2of4-50", True),
        ({"RECIPE": "Wanda", "MASK": "unstructured", "SPARSITY": 0.3}, "wanda-unstructured-30", True),
        ({"RECIPE": "KVCache"}, "kvcache", True),
    ],
)
def test_a_configuration_has_a_name_and_knows_whether_it_reads_text(section, label, text):
    made = settings(**section)
    assert (made.label, made.needs_text) == (label, text)


# -- the model


CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 256, "num_attention_heads": 4}


def headers(**widths):
    sizes = {"q_proj": 256, "k_proj": 256, "v_proj": 256, "down_proj": 256, **widths}
    names = {f"model.layers.0.self_attn.{n}.weight": (64, w) for n, w in sizes.items()}
    names |= {f"model.layers.0.{norm}.weight": (256,) for norm in ("input_layernorm", "post_attention_layernorm")}
    names |= {"model.embed_tokens.weight": (100, 77), "model.norm.weight": (256,), "lm_head.weight": (100, 77)}
    return [TensorInfo(name, "BF16", shape, "model.safetensors", 2) for name, shape in names.items()]


def found(config=None, tensors=None, **section):
    rows = llm_problems(tensors or headers(), settings(**section), {**CONFIG, **(config or {})})
    return [row.message for row in rows]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_that_fits_has_no_problem(recipe):
    assert found(RECIPE=recipe) == []


@pytest.mark.parametrize(
    ("section", "widths", "says"),
    [
        ({}, {"down_proj": 192}, "GROUP_SIZE: found 128; .*down_proj .192 inputs.; set GROUP_SIZE to 64 or 32 or -1"),
        ({}, {"down_proj": 64}, "GROUP_SIZE: found 128; .*set GROUP_SIZE to 64 or 32 or -1"),
        ({"GROUP_SIZE": 64}, {"down_proj": 100}, "GROUP_SIZE: found 64; .*set GROUP_SIZE to -1, or add these to IGN"),
        ({"RECIPE": "RTN", "SCHEME": "NVFP4A16"}, {"down_proj": 200}, "SCHEME: found 'NVFP4A16'; its groups of 16"),
        ({"RECIPE": "AutoRound"}, {"down_proj": 192}, "SCHEME: found 'W4A16'; its groups of 128"),
        ({"RECIPE": "Wanda"}, {"down_proj": 102}, "MASK: found '2:4'; its groups of 4"),
        ({"TARGETS": "re:.*mlp.*"}, {}, "TARGETS: found .*matches no Linear .*named like model.layers.0.self_attn.q"),
        ({"IGNORE": ["Linear"]}, {}, "IGNORE: found .*leaves no Linear"),
    ],
)
def test_what_a_model_rules_out_is_named_with_the_way_out(section, widths, says):
    import re

    (message,) = found(tensors=headers(**widths), **section)
    assert re.match(r"llm\.LLMCompressor\." + says, message)


def test_autoround_leaves_the_head_alone_even_if_it_is_tied():
    """It would store scales for the head that it never computed."""
    with_head = [*headers(), TensorInfo("output.weight", "BF16", (96, 256), "m", 2)]
    ignored = {"RECIPE": "AutoRound", "IGNORE": ["lm_head"]}
    assert "AutoRound quantizes decoder layers only; add output to IGNORE" in found(tensors=with_head, **ignored)[0]
    tied = [h for h in headers() if "lm_head" not in h.name]
    assert "add lm_head to IGNORE" in found({"tie_word_embeddings": True}, tied, RECIPE="AutoRound", IGNORE=[])[0]
    assert found({"tie_word_embeddings": True}, tied, **ignored) == []


def test_what_is_ignored_or_per_row_may_have_any_width():
    odd = headers(down_proj=100)
    assert found(tensors=odd, IGNORE=["lm_head", "model.layers.0.self_attn.down_proj"]) == []
    assert found(tensors=odd, IGNORE=["lm_head", "re:.*down_proj$"]) == []
    assert found(tensors=odd, GROUP_SIZE=-1) == []
    assert found(tensors=odd, RECIPE="RTN", SCHEME="FP8_DYNAMIC") == []
    assert found(tensors=odd, RECIPE="Wanda", MASK="unstructured") == []


def test_a_cache_needs_keys_and_values():
    fused = [h for h in headers() if "k_proj" not in h.name]
    assert "RECIPE: found 'KVCache'; the model has no k_proj" in found(tensors=fused, RECIPE="KVCache")[0]
    assert "KV_CACHE_FP8: found True" in found(tensors=fused, KV_CACHE_FP8=True)[0]

    assert "cannot do it for opt" in found({"model_type": "opt"}, RECIPE="KVCache")[0]


@pytest.mark.parametrize("recipe", ["SmoothQuant+GPTQ", "SpinQuant+RTN"])
def test_a_model_with_one_norm_more_is_not_smoothed_or_rotated(recipe):
    """SmoothQuant takes the wrong norm of Gemma 2 and 3 without a word: 8 bits come out worse than 4."""
    extra = [*headers(), TensorInfo("model.layers.0.pre_feedforward_layernorm.weight", "BF16", (256,), "m", 2)]
    (message,) = found(tensors=extra, RECIPE=recipe)
    assert f"RECIPE: found '{recipe}'; it does not know what to do with the model's pre_feedforward" in message
    assert found(tensors=extra, RECIPE="AWQ") == found(tensors=extra) == []


@pytest.mark.parametrize("recipe", ["AWQ", "AWQ+GPTQ", "SmoothQuant+GPTQ", "SpinQuant+RTN"])
def test_a_recipe_that_pairs_modules_by_name_needs_these_names(recipe):
    other = [h for h in headers() if "input_layernorm" not in h.name]
    (message,) = found(tensors=other, RECIPE=recipe)
    assert "the model has no input_layernorm; use GPTQ or RTN" in message


def test_a_fused_attention_is_smoothed_but_not_rotated():
    fused = [h for h in headers() if not h.name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]
    fused += [TensorInfo("model.layers.0.self_attn.qkv_proj.weight", "BF16", (96, 256), "m", 2)]
    assert found(tensors=fused, RECIPE="AWQ") == []
    assert "no q_proj and no k_proj and no v_proj" in found(tensors=fused, RECIPE="SpinQuant+RTN")[0]


@pytest.mark.parametrize(("hidden", "fits"), [(4096, True), (896, True), (5120, True), (4544, False), (90, False)])
def test_a_rotation_needs_a_hadamard_matrix(hidden, fits):
    from compressed_tensors.transform.utils.hadamard import random_hadamard_matrix

    rows = found({"hidden_size": hidden, "head_dim": 64}, RECIPE="SpinQuant+RTN")
    assert bool(rows) is not fits
    if fits:
        random_hadamard_matrix(hidden)
    else:
        assert f"hidden size {hidden}" in rows[0]
        with pytest.raises(ValueError, match="hadamard"):
            random_hadamard_matrix(hidden)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"quantization_config": {"bits": 4}}, "quantized already"),
        ({"model_type": "gpt2"}, "Conv1D"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
    ],
)
def test_a_model_that_no_recipe_takes_is_refused(config, says):
    with pytest.raises(ModelError, match=says):
        found(config)


def test_a_folder_is_checked_by_its_headers(tmp_path):
    model = make_model(tmp_path / "model", intermediate_size=192)
    with pytest.raises(ConfigErrors, match=r"down_proj \(192 inputs\)"):
        check_llm(model, settings())
    check_llm(model, settings(GROUP_SIZE=64).model_dump())
