"""Imports made quickly: what is left out comes back, what is imported is the same, collection goes on."""

import subprocess
import sys

from backend.paths import PROJECT

BEFORE = """
import gc, sys
from backend.quick_start import quick_import
"""


def said(code):
    done = subprocess.run(
        [sys.executable, "-c", BEFORE + code], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_transformers_comes_without_scikit_learn_which_can_be_imported_afterwards():
    code = """
quick_import("backend.formats.loader")
print("transformers" in sys.modules, "sklearn" in sys.modules, "pandas" in sys.modules, gc.isenabled())
print(gc.get_freeze_count() > 100_000)
import sklearn.metrics
print(sklearn.metrics.f1_score([1, 0], [1, 0]))
"""
    assert said(code) == ["True", "False", "False", "True", "True", "1.0"]


def test_what_was_imported_before_stays_and_nothing_is_frozen_twice():
    code = """
import sklearn
quick_import("transformers.generation.candidate_generator")
print(sys.modules["sklearn"] is sklearn)
frozen, kept = gc.get_freeze_count(), [[] for _ in range(1000)]
quick_import("transformers.generation.candidate_generator")
print(gc.get_freeze_count() == frozen)
"""
    assert said(code) == ["True", "True"]


def test_a_module_that_is_missing_is_an_error_and_leaves_all_as_it_was():
    code = """
gc.disable()
try:
    quick_import("backend.no_such_module")
except ModuleNotFoundError as error:
    print(error.name)
print(gc.isenabled(), sys.modules.get("sklearn", "absent"))
"""
    assert said(code) == ["backend.no_such_module", "False", "absent"]
