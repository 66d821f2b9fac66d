"""The whole path in a real browser: form, job, charts, chat, with nothing asked of any other host.

With QUANTDECK_SCREENSHOTS=1 it also writes docs/screenshots, light and dark.
"""

from __future__ import annotations

import os
import re

import pytest

from backend.paths import PROJECT
from tests.dashboard import IN_BROWSER, OWN_NOISE, STEP_MS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
expect = playwright.expect

SHOTS = PROJECT / "docs" / "screenshots" if os.environ.get("QUANTDECK_SCREENSHOTS") == "1" else None
JOB_FILE = """\
# my own note
MODEL: "quantdeck/demo"
MY_KEY: kept
DATASET_NAME: "quantdeck/demo"
ALGORITHM: "AutoAWQ"
JOB_ID: "from-a-file"
CALIBRATION: {SAMPLES: 8, SEQUENCE_LENGTH: 256}
EVALUATION: {MAX_WINDOWS: 4, TASKS: ["quantdeck_demo:0:20"]}
BENCHMARK: {PROMPT_TOKENS: 16, NEW_TOKENS: 8, WARMUP: 1, REPETITIONS: 3}
"""

pytestmark = IN_BROWSER


def shoot(page, name: str) -> None:
    """Screenshots for the documentation, of the page as it is now."""
    if SHOTS is None:
        return
    SHOTS.mkdir(parents=True, exist_ok=True)
    for mode in ("light", "dark"):
        page.emulate_media(color_scheme=mode)
        page.evaluate("mode => document.body.classList.toggle('dark', mode === 'dark')", mode)
        page.wait_for_timeout(300)
        page.screenshot(path=SHOTS / f"{name}-{mode}.png", full_page=True)
    page.emulate_media(color_scheme="light")
    page.evaluate("document.body.classList.remove('dark')")


def fill(page, key: str, value: str) -> None:
    box = page.locator(f"#f-{key} :is(input, textarea)").first
    box.fill(value)
    box.blur()


def test_demo_job_from_form_to_chat(address, watched):
    page, faults = watched
    page.goto(address)
    expect(page.get_by_role("heading", name="No jobs yet")).to_be_visible(timeout=STEP_MS)
    shoot(page, "jobs-empty")
    page.get_by_role("link", name="Start with the demo").click()

    # The form: a wrong value is told at its field and loses nothing, then a small job is started.
    expect(page.locator("#model-facts")).to_contain_text("LlamaForCausalLM", timeout=STEP_MS)
    expect(page.locator("#review")).to_contain_text("What this job will do", timeout=STEP_MS)
    shoot(page, "new-job")
    fill(page, "JOB_ID", "browser job")
    expect(page.locator("#review")).to_contain_text("1 setting needs a change", timeout=STEP_MS)
    expect(page.locator("#f-JOB_ID")).to_contain_text("a job name starts with a letter or digit", timeout=STEP_MS)
    page.locator("#start").click()
    expect(page.get_by_text("The job was not started")).to_be_visible(timeout=STEP_MS)
    expect(page.locator("#f-JOB_ID input")).to_have_value("browser job")

    # Another algorithm has other settings; of some several can be chosen, and each result is foretold.
    fill(page, "JOB_ID", "browser-job")
    page.locator("#f-ALGORITHM").get_by_text("Native", exact=True).click()
    expect(page.locator("#algorithm-Native")).to_be_visible(timeout=STEP_MS)
    expect(page.locator("#algorithm-AutoAWQ")).to_have_count(0)
    page.locator("#f-llm-Native-W_BIT input").click()
    page.get_by_role("option", name="3", exact=True).click()
    expect(page.locator("#yaml")).to_contain_text("W_BIT: [4, 3]", timeout=STEP_MS)
    expect(page.locator("#review")).to_contain_text("GPTQ 3 bit, groups of 128", timeout=STEP_MS)

    # A file opened in the form brings its own values, and its comments and unknown keys stay.
    page.get_by_text("Open a YAML file").click()
    file = {"name": "mine.yaml", "mimeType": "application/yaml", "buffer": JOB_FILE.encode()}
    page.locator("#yaml-file input[type=file]").set_input_files(file)
    expect(page.get_by_text("mine.yaml is in the form")).to_be_visible(timeout=STEP_MS)
    expect(page.locator("#algorithm-AutoAWQ")).to_be_visible(timeout=STEP_MS)
    expect(page.locator("#f-BENCHMARK-REPETITIONS input")).to_have_count(0)  # folded away, and yet submitted
    fill(page, "JOB_ID", "browser-job")
    fill(page, "CALIBRATION-SEQUENCE_LENGTH", "128")
    expect(page.locator("#yaml")).to_contain_text("# my own note", timeout=STEP_MS)
    expect(page.locator("#yaml")).to_contain_text("SEQUENCE_LENGTH: 128", timeout=STEP_MS)
    expect(page.locator("#review")).to_contain_text("8 x 128 tokens", timeout=STEP_MS)
    expect(page.locator("#review")).to_contain_text("MY_KEY: unknown key")
    page.locator("#start").click()

    # The job: it survives a reload in the middle, and ends with a table, a chart and a log.
    page.wait_for_url("**/job?id=*")
    expect(page.locator("#job-head h1")).to_contain_text("browser-job", timeout=STEP_MS)
    expect(page.locator("#stages")).to_contain_text("Quantize layer by layer", timeout=STEP_MS)
    page.reload()
    expect(page.locator("#job-head h1")).to_contain_text("browser-job", timeout=STEP_MS)
    expect(page.locator("#job-head")).to_contain_text(re.compile("Succeeded|Failed"), timeout=400_000)
    expect(page.locator("#job-head")).to_contain_text("Succeeded")
    expect(page.locator("#result .qd-result")).to_contain_text("Perplexity")
    expect(page.locator("#layers .js-plotly-plot .scatterlayer path.js-line")).to_have_count(2)
    expect(page.locator("#log")).to_contain_text("stage")
    expect(page.locator("#artefact")).to_contain_text("model.safetensors")
    shoot(page, "job")

    # Compare: charts with bars; a distance from the baseline has no bar for the baseline.
    page.get_by_role("link", name="Compare", exact=True).last.click()
    for name, bars in (
        ("perplexity", 2), ("accuracy", 2), ("divergence", 1), ("weight", 2), ("size", 2), ("throughput", 2),
    ):  # fmt: skip
        drawn = page.locator(f"#chart-{name} .js-plotly-plot .bars .point > path")
        expect(drawn).to_have_count(bars, timeout=STEP_MS)
    expect(page.locator("#compare-table")).to_contain_text("browser-job")
    shoot(page, "compare")

    # Chat: one message, two answers.
    page.goto(f"{address}/chat")
    expect(page.locator("#message textarea")).to_be_visible(timeout=STEP_MS)
    page.locator("#message textarea").fill("Hello! Who are you?")
    page.locator("#send").click()
    for side in ("baseline", "quantized"):
        expect(page.locator(f"#chat-{side} .bot").first).to_have_text(re.compile(r"\w+"), timeout=STEP_MS)
        expect(page.locator(f"#head-{side}")).to_contain_text("tokens/s", timeout=STEP_MS)
        expect(page.locator(f"#head-{side}")).to_contain_text("peak memory", timeout=STEP_MS)
    shoot(page, "chat")
    page.locator("#chat-unload").click()
    expect(page.locator("#chat-said")).to_contain_text("unloaded", timeout=STEP_MS)

    # The list knows it all; a clone opens with a name that is free.
    page.goto(address)
    expect(page.locator('#jobs tr[data-job="browser-job"]')).to_contain_text("Succeeded", timeout=STEP_MS)
    expect(page.locator('#jobs tr[data-job="browser-job"]')).to_contain_text("of the size")
    shoot(page, "jobs")
    page.locator('#jobs tr[data-job="browser-job"]').get_by_role("link", name="Clone").click()
    expect(page.locator("#f-JOB_ID input")).to_have_value("browser-job-2", timeout=STEP_MS)
    expect(page.locator("#f-CALIBRATION-SAMPLES input")).to_have_value("8")

    # A running job can be cancelled, after a question.
    expect(page.locator("#review")).to_contain_text("8 x 128 tokens", timeout=STEP_MS)
    page.locator("#start").click()
    page.wait_for_url("**/job?id=*")
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#job-head")).to_contain_text("Cancelled", timeout=STEP_MS)
    expect(page.get_by_role("button", name="Cancel")).to_have_count(0)

    # It goes on where it stopped.
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("button", name="Resume")).to_have_count(0, timeout=STEP_MS)
    expect(page.locator("#job-head")).to_contain_text(re.compile("Succeeded|Failed"), timeout=400_000)
    expect(page.locator("#job-head")).to_contain_text("Succeeded")
    expect(page.locator(".qd-facts dd", has_text="attempt 2")).to_be_visible()

    # The choice of light or dark stays.
    page.get_by_role("button", name="Switch between light and dark").click()
    page.goto(address)
    expect(page.locator("body.dark")).to_be_visible(timeout=STEP_MS)

    assert [fault for fault in faults if not OWN_NOISE.search(fault)] == []
