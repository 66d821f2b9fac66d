"""YAML both ways in a real browser: each guide's file opened, shown, changed, put wrong and started, in one page."""

from __future__ import annotations

import pytest

from tests.conftest import EXAMPLES
from tests.dashboard import IN_BROWSER, OWN_NOISE, STEP_MS

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
expect = playwright.expect

pytestmark = IN_BROWSER

GUIDES = {name: (EXAMPLES / f"{name}.yaml").read_bytes().decode() for name in (
    "awq_guide", "aqlm_guide", "tensorrtllm_guide", "llmcompressor_guide",
)}  # fmt: skip
SHOWN = {
    "awq_guide": {"MODEL": "meta-llama/Meta-Llama-3.1-8B-Instruct", "DATASET_SUBNAME": "wikitext-2-raw-v1"},
    "aqlm_guide": {"MODEL": "RLHFlow/LLaMA3-iterative-DPO-final", "JOB_ID": "aqlm_quantization"},
    "tensorrtllm_guide": {"MODEL": "meta-llama/Llama-2-7b-hf", "DATASET_SUBNAME": "wikitext-2-raw-v1"},
    "llmcompressor_guide": {"TEXT_COLUMN": "messages", "CALIBRATION-SAMPLES": "512", "EVALUATION-TASKS": "gsm8k:5:250"},
}
CHOSEN = {
    "awq_guide": ("llm-AutoAWQ-VERSION", "GEMV"), "aqlm_guide": ("llm-AQLM-EFFORT", "default"),
    "tensorrtllm_guide": ("llm-TensorRTLLM-dtype", "float16"), "llmcompressor_guide": ("ALGORITHM", "LLMCompressor"),
}  # fmt: skip
# Words of each guide, wrong ones for them, the control of that setting, what is told at it, and what puts it right.
WRONG = {
    "awq_guide": ("Q_GROUP_SIZE: 128", "Q_GROUP_SIZE: 100", "llm-AutoAWQ-Q_GROUP_SIZE", "128, 64 or 32", "128"),
    "aqlm_guide": ("val_size: 256", "val_size: 4000", "llm-AQLM-calibration_config-val_size", "are 0 to 2047", "256"),
    "tensorrtllm_guide": ("calib_size: 32", "calib_size: -2", "llm-TensorRTLLM-calib_size", "at least 1", "32"),
    "llmcompressor_guide": ('"W4A16" ', '"NVFP4" ', "llm-LLMCompressor-SCHEME", "RECIPE GPTQ makes W4A16", "W4A16"),
}  # fmt: skip
FOR_A_GPU = ('quant_method: "int4_awq"', 'quant_method: "nvfp4"\n    dtype: bfloat16')


def open_file(page, name: str, text: str) -> None:
    page.locator("#yaml-file input[type=file]").set_input_files(
        {"name": name, "mimeType": "application/octet-stream", "buffer": text.encode()}
    )
    expect(page.locator("#opened")).to_contain_text(f"{name} is in the form", timeout=STEP_MS)
    page.locator("#yaml-file button").first.click()  # makes room for the next one
    expect(page.locator("#yaml-file input[type=file]")).to_have_count(1)


def wait_for_file(page, text: str) -> None:
    """Until the page's own YAML, as its Download link has it, is this text to the letter."""
    page.wait_for_function(
        "text => { const link = document.querySelector('#yaml a[download]');"
        " return link && decodeURIComponent(link.href.split(',').slice(1).join(',')) === text; }",
        arg=text, timeout=STEP_MS,
    )  # fmt: skip


def start_is_refused(page, words: str) -> None:
    page.locator("#start").click()
    told = page.locator(".qd-notice", has_text="The job was not started")
    expect(told).to_contain_text(words, timeout=STEP_MS)
    assert page.url.endswith("/new")


def put_right(page, key: str, value: str) -> None:
    """Choose or type a value at a control."""
    control = page.locator(f"#f-{key}")
    if control.locator("input[role=listbox], .wrap-inner input").count():
        control.locator("input").first.click()
        page.get_by_role("option", name=value, exact=True).click()
        page.keyboard.press("Escape")
    else:
        control.locator("input").first.fill(value)
        control.locator("input").first.blur()


def test_every_guide_goes_through_the_page(address, watched):
    page, faults = watched
    page.goto(f"{address}/new")
    expect(page.locator("#review")).to_contain_text("What this job will do", timeout=STEP_MS)
    page.get_by_text("Open a YAML file").click()
    for name, text in GUIDES.items():
        # A file with a wrong value comes into the form: told with its line at its control, also in a part that was
        # closed or hidden, and given back to the letter.
        right, bad, key, words, value = WRONG[name]
        odd = text.replace(right, bad)
        line = 1 + next(number for number, one in enumerate(odd.split("\n")) if bad in one)
        open_file(page, f"{name}.yaml", odd)
        expect(page.locator("#opened")).to_contain_text(f"line {line}")
        expect(page.locator(f"#f-{key}")).to_contain_text(f"Line {line}: ", timeout=STEP_MS)
        expect(page.locator(f"#f-{key}")).to_contain_text(words)
        wait_for_file(page, odd)
        for shown, wanted in SHOWN[name].items():
            box = page.locator(f"#f-{shown} :is(input, textarea)").first
            expect(box).to_have_value(wanted, timeout=STEP_MS)
        shown, wanted = CHOSEN[name]
        expect(page.locator(f"#f-{shown}").get_by_label(wanted, exact=True)).to_be_checked(timeout=STEP_MS)
        if name == "awq_guide":
            start_is_refused(page, words)

        # Put right there, the page has the guide's file to the letter; one other change is one other line.
        put_right(page, key, value)
        wait_for_file(page, text)
        put_right(page, "CUDA_ID", "7")
        wait_for_file(page, "\n".join('CUDA_ID: "7"' if one.startswith("CUDA_ID") else one for one in text.split("\n")))

    # What the machine lacks is said when it is started.
    lacking = GUIDES["tensorrtllm_guide"].replace("    dtype: float16\n", "").replace(*FOR_A_GPU)
    page.locator("#yaml-paste textarea").fill(lacking)
    page.locator("#yaml-fill").click()
    expect(page.locator("#opened")).to_contain_text("The pasted file is in the form", timeout=STEP_MS)
    expect(page.locator("#f-llm-TensorRTLLM-quant_method")).to_contain_text("needs an NVIDIA GPU", timeout=STEP_MS)
    expect(page.locator("#model-facts")).to_contain_text("the Hub cannot be asked", timeout=STEP_MS)
    start_is_refused(page, "needs an NVIDIA GPU to quantize too, and there is none; choose int4_awq")

    # Settings that do not matter are not shown; other programs get what they can read.
    page.locator("#f-EVALUATION-ENABLED input").click()
    expect(page.locator("#f-EVALUATION-TASKS")).to_have_count(0, timeout=STEP_MS)
    expect(page.get_by_text("Perplexity text, window and batch")).to_have_count(0)
    expect(page.locator('.qd-exports [data-target="llmcompressor"]')).to_contain_text("Not possible", timeout=STEP_MS)
    assert [fault for fault in faults if not OWN_NOISE.search(fault)] == []
