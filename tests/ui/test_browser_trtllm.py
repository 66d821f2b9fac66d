"""TensorRT-LLM in a real browser: picked in the form, its limits told before the start, run up to its honest boundary.

With QUANTDECK_SCREENSHOTS=1 it also writes docs/screenshots.
"""

from __future__ import annotations

import re

import pytest

from tests.conftest import EXAMPLES
from tests.dashboard import IN_BROWSER, OWN_NOISE, STEP_MS
from tests.ui.test_browser import fill, shoot

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
expect = playwright.expect

pytestmark = [*IN_BROWSER, pytest.mark.timeout(1800)]
GUIDE = (EXAMPLES / "tensorrtllm_guide.yaml").read_text(encoding="utf-8")


def test_the_guides_job_runs_from_the_page_up_to_where_a_gpu_is_needed(address, watched):
    page, faults = watched
    page.goto(f"{address}/new")
    expect(page.locator("#review")).to_contain_text("What this job will do", timeout=STEP_MS)

    # The guide's file opens in the form, its placeholder line included; the model is the only thing to change.
    page.locator("#example input").click()
    page.get_by_role("option", name=re.compile("tensorrtllm_guide")).click()
    expect(page.get_by_text("tensorrtllm_guide.yaml is in the form")).to_be_visible(timeout=STEP_MS)
    expect(page.locator("#yaml")).to_contain_text("...other params", timeout=STEP_MS)
    for key, value in {"DATASET_SUBNAME": "", "MODEL": "quantdeck/demo", "DATASET_NAME": "quantdeck/demo"}.items():
        fill(page, key, value)
    expect(page.locator("#review")).to_contain_text("needs an NVIDIA GPU, and there is none here", timeout=STEP_MS)
    expect(page.locator("#review")).to_contain_text("4.26")
    shoot(page, "new-tensorrtllm")

    # A method that no CPU can make is refused at its field.
    fill(page, "llm-TensorRTLLM-calib_size", "0")
    expect(page.locator("#f-llm-TensorRTLLM-calib_size")).to_contain_text("at least 1", timeout=STEP_MS)
    fill(page, "llm-TensorRTLLM-calib_size", "4")
    fill(page, "JOB_ID", "trt-browser")
    page.locator("#f-EVALUATION-ENABLED input").click()  # measured by the tests of the job itself
    expect(page.locator("#yaml")).to_contain_text("calib_size: 4", timeout=STEP_MS)
    page.locator("#start").click()

    page.wait_for_url("**/job?id=*")
    expect(page.locator("#job-head h1")).to_contain_text("trt-browser", timeout=STEP_MS)
    expect(page.locator("#stages")).to_contain_text("Quantize with nvidia-modelopt", timeout=STEP_MS)
    expect(page.locator("#job-head")).to_contain_text(re.compile("Succeeded|Failed"), timeout=900_000)
    expect(page.locator("#job-head")).to_contain_text("Succeeded")
    expect(page.get_by_text("Finished as far as this machine can")).to_be_visible()
    expect(page.locator("#tensorrt")).to_contain_text("none are guessed")
    shoot(page, "job-tensorrtllm")
    page.locator("#tensorrt summary").first.click()
    expect(page.locator("#tensorrt pre").first).to_contain_text("trtllm-bench --model local")
    expect(page.locator("#artefact")).to_contain_text("run_tensorrt_llm.sh")
    expect(page.locator("#layers .js-plotly-plot .scatterlayer path.js-line")).to_have_count(1, timeout=STEP_MS)
    expect(page.locator("#layers")).to_contain_text("Weight error by layer")
    with page.expect_download() as download:
        page.locator("#tensorrt a[download]").first.click()
    assert download.value.path().read_text(encoding="utf-8").startswith("#!/bin/sh")
    assert [fault for fault in faults if not OWN_NOISE.search(fault)] == []
