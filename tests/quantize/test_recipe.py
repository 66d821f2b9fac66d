from __future__ import annotations

import json
from typing import Any

import pytest

from backend.errors import ConfigError
from backend.quantize.recipe import BITS, GROUP_SIZES, METHODS, Override, Recipe, Scheme

BASE = Scheme("GPTQ", 4, 64)
OTHER = Scheme("RTN", 8, 32, True)
NAME = "model.layers.3.mlp.down_proj"


def test_the_first_override_that_matches_decides() -> None:
    third = Scheme("AWQ", 2, 32)
    recipe = Recipe("r", BASE, overrides=(Override("*.3.mlp.*", OTHER), Override("*.down_proj", third)))
    assert recipe.scheme_for(NAME, 128) == OTHER
    assert recipe.scheme_for("model.layers.4.mlp.down_proj", 128) == third
    assert recipe.scheme_for("model.layers.4.mlp.up_proj", 128) == BASE
    turned = Recipe("r", BASE, overrides=recipe.overrides[::-1])
    assert turned.scheme_for(NAME, 128) == third


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (NAME, True),
        ("*", True),
        ("model.layers.[1-3].*", True),
        ("model.layers.?.mlp.*", True),
        ("down_proj", False),  # the whole name is matched
        ("*.mlp", False),
        ("*.DOWN_PROJ", False),
        ("model.layers.[!3].*", False),
    ],
)
def test_patterns_are_shell_style_over_the_whole_name(pattern: str, matches: bool) -> None:
    recipe = Recipe("r", BASE, overrides=(Override(pattern, OTHER),))
    assert recipe.scheme_for(NAME, 128) == (OTHER if matches else BASE)


def test_an_override_can_keep() -> None:
    recipe = Recipe("r", BASE, overrides=(Override("*.3.*", None), Override("*", OTHER)))
    assert recipe.scheme_for(NAME, 128) == "it matches '*.3.*', which is to be kept"
    assert recipe.scheme_for("model.layers.4.mlp.up_proj", 128) == OTHER


def test_keep_goes_before_overrides() -> None:
    recipe = Recipe("r", BASE, overrides=(Override("*", OTHER),), keep=("lm_head", "mlp.down"))
    assert recipe.scheme_for(NAME, 128) == "its name contains 'mlp.down', which is to be kept"
    assert recipe.scheme_for("lm_head", 128) == "its name contains 'lm_head', which is to be kept"
    assert recipe.scheme_for("model.layers.3.mlp.up_proj", 128) == OTHER


@pytest.mark.parametrize(
    ("group_size", "width", "fit"),
    [
        (128, 256, 128),
        (128, 192, 64),
        (128, 96, 32),
        (64, 96, 32),
        (128, 80, None),
        (64, 32, 32),
        (32, 48, None),
        (-1, 80, -1),
    ],
)
@pytest.mark.parametrize("as_override", [False, True])
def test_misfits(group_size: int, width: int, fit: int | None, as_override: bool) -> None:
    scheme = Scheme("AWQ", 3, group_size, True)
    changes: dict[str, Any] = {"overrides": (Override("*", scheme),)} if as_override else {"scheme": scheme}
    reason = f"group size {group_size} does not divide its {width} inputs"
    kept = Recipe("r", **changes).scheme_for(NAME, width)
    assert kept == (scheme if fit == group_size else reason)
    fitted = Recipe("r", misfit="fit", **changes).scheme_for(NAME, width)
    assert fitted == (reason if fit is None else Scheme("AWQ", 3, fit, True))


def test_what_methods_do() -> None:
    found = {method: (Scheme(method).scales_channels, Scheme(method).feeds_back) for method in METHODS}
    assert found == {
        "RTN": (False, False), "AWQ": (True, False), "GPTQ": (False, True), "AWQ+GPTQ": (True, True)
    }  # fmt: skip


def test_labels_tell_schemes_apart() -> None:
    assert Scheme("AWQ+GPTQ", 3, 64, True).label == "awq-gptq-w3-g64-sym"
    assert Scheme("RTN", 8, -1).label == "rtn-w8-channel"
    schemes = [Scheme(m, b, g, s) for m in METHODS for b in BITS for g in (*GROUP_SIZES, -1) for s in (False, True)]
    assert len({s.label for s in schemes}) == len(schemes)


def test_dictionaries_hold_everything() -> None:
    recipe = Recipe(
        "mixed", Scheme("AWQ+GPTQ", 3, -1, True), (Override("*.0.*", OTHER), Override("*.v_proj", None)),
        ("lm_head", "gate"), "fit", 7, False, False, 0.5,
    )  # fmt: skip
    default = Recipe("r")
    for each in (recipe, default):
        values = each.to_dict()
        assert Recipe.from_dict(values) == each
        assert Recipe.from_dict(json.loads(json.dumps(values))) == each
        changed = {k: v for k, v in values.items() if getattr(recipe, k) != getattr(default, k)}
        assert len(changed) == 9  # every field is told apart here
    assert hash(Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))) == hash(recipe)  # tuples, no lists
    assert Recipe.from_dict({"name": "r"}) == default


@pytest.mark.parametrize(
    ("make", "key", "told"),
    [
        (lambda: Scheme("gptq"), "method", "found 'gptq'; allowed are RTN, AWQ, GPTQ, AWQ[+]GPTQ"),
        (lambda: Scheme(bits=5), "bits", "found 5; allowed are 2, 3, 4, 8"),
        (lambda: Scheme(bits=True), "bits", "found True"),
        (lambda: Scheme(group_size=0), "group_size", "found 0; allowed are 32, 64, 128, -1"),
        (lambda: Scheme(group_size=256), "group_size", "found 256"),
        (lambda: Recipe("r", misfit="drop"), "misfit", "found 'drop'; allowed are keep, fit"),
        (lambda: Recipe("r", scale_grid=-1), "scale_grid", "found -1; 0 or more"),
        (lambda: Recipe("r", damp=0.0), "damp", "found 0.0; above 0 and at most 1"),
        (lambda: Recipe("r", damp=1.5), "damp", "found 1.5"),
        (lambda: Recipe("r", damp=float("nan")), "damp", "found nan"),
        (lambda: Recipe.from_dict({"name": "r", "scheme": {"bits": 16}}), "bits", "found 16"),
        (
            lambda: Recipe.from_dict({"name": "r", "overrides": [{"pattern": "*", "scheme": {"method": "x"}}]}),
            "method",
            "found 'x'",
        ),
    ],
)
def test_bad_values_are_named(make: Any, key: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: {told}") as caught:
        make()
    assert caught.value.key == key
