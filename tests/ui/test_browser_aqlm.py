"""AQLM in a real browser: picked in the form with sizes that suit the demo, bits foretold, started, tuned, shown.

With QUANTDECK_SCREENSHOTS=1 it also writes docs/screenshots, light and dark.
"""

from __future__ import annotations

import re

import pytest

from tests.dashboard import IN_BROWSER, OWN_NOISE, STEP_MS
from tests.ui.test_browser import fill, shoot

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
expect = playwright.expect

pytestmark = [*IN_BROWSER, pytest.mark.timeout(2400)]
SMALL = {
    "calibration_config-nsamples": "16", "calibration_config-model_seqlen": "128", "calibration_config-val_size": "4",
    "calibration_config-finetune_max_epochs": "1", "calibration_config-finetune_batch_size": "4",
    "finetune_config-max_epochs": "2", "finetune_config-batch_size": "4", "finetune_config-microbatch_size": "4",
    "finetune_config-model_seqlen": "128", "FINETUNE_DATA-SAMPLES": "96", "FINETUNE_DATA-VAL_SAMPLES": "16",
}  # fmt: skip


def unfold(page, name: str) -> None:
    """Open a part of the form, unless something wrong in it has opened it for a moment's value."""
    head = page.locator("#algorithm-AQLM button.label-wrap", has_text=name).first
    if "open" not in (head.get_attribute("class") or "").split():
        head.click()


def test_an_aqlm_job_from_form_to_tuned_model(address, watched):
    page, faults = watched
    page.goto(f"{address}/new")
    expect(page.locator("#review")).to_contain_text("What this job will do", timeout=STEP_MS)

    # Picking the algorithm is enough for a job of the demo model; its results and bits are foretold.
    page.locator("#f-ALGORITHM").get_by_text("AQLM", exact=True).click()
    expect(page.get_by_text("AQLM with sizes that suit the demo model")).to_be_visible(timeout=STEP_MS)
    expect(page.locator("#yaml")).to_contain_text("nsamples: ", timeout=STEP_MS)
    expect(page.locator("#review")).to_contain_text("2, the second one tuned from the first", timeout=STEP_MS)
    expect(page.locator("#review")).to_contain_text("2.33 bits per weight")
    expect(page.locator("#review")).to_contain_text("decide which step is kept")
    shoot(page, "new-aqlm")

    # Settings inside a section are told apart by their group; a wrong one is told at its control.
    for name in ("Calibration text: how much", "Block finetuning", "Tuning of the whole model", "Tuning text"):
        unfold(page, name)
    fill(page, "llm-AQLM-calibration_config-val_size", "100000")
    expect(page.locator("#f-llm-AQLM-calibration_config-val_size")).to_contain_text("at most 65535", timeout=STEP_MS)
    for key, value in SMALL.items():
        fill(page, f"llm-AQLM-{key}", value)
    fill(page, "JOB_ID", "aqlm-browser")
    page.locator("#f-EVALUATION-ENABLED input").click()
    page.locator("#f-BENCHMARK-ENABLED input").click()
    expect(page.locator("#yaml")).to_contain_text("nsamples: 16", timeout=STEP_MS)
    expect(page.locator("#review")).to_contain_text("16 x 128 tokens", timeout=STEP_MS)
    page.locator("#start").click()

    # The job has its own stages, and draws layers and steps while they are made.
    page.wait_for_url("**/job?id=*")
    expect(page.locator("#job-head h1")).to_contain_text("aqlm-browser", timeout=STEP_MS)
    expect(page.locator("#stages")).to_contain_text("Tune the whole model", timeout=STEP_MS)
    expect(page.locator("#job-head")).to_contain_text(re.compile("Succeeded|Failed"), timeout=1_500_000)
    expect(page.locator("#job-head")).to_contain_text("Succeeded")
    expect(page.locator("#layers .js-plotly-plot .scatterlayer path.js-line")).to_have_count(2, timeout=STEP_MS)
    expect(page.locator("#tuning .js-plotly-plot .scatterlayer path.js-line")).to_have_count(2, timeout=STEP_MS)
    expect(page.locator("#artefact")).to_contain_text("tuned")
    expect(page.locator("#configurations")).to_contain_text("AQLM 2 x 8 bit, groups of 8, tuned")
    shoot(page, "job-aqlm")

    # The guide's file opens in the form with its own values.
    page.goto(f"{address}/new")
    page.locator("#example input").click()
    page.get_by_role("option", name=re.compile("aqlm_guide")).click()
    expect(page.get_by_text("aqlm_guide.yaml is in the form")).to_be_visible(timeout=STEP_MS)
    expect(page.locator("#yaml")).to_contain_text("relative_mse_tolerance: 0.01", timeout=STEP_MS)
    expect(page.locator("#review")).to_contain_text("tuning uses them all", timeout=STEP_MS)
    assert [fault for fault in faults if not OWN_NOISE.search(fault)] == []
