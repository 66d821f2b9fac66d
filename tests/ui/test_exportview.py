"""The New job page offers a draft's settings to other programs, or says why it cannot."""

from __future__ import annotations

import html
import re
from urllib.parse import unquote

import pytest

from backend.jobs.export import export_text
from tests.conftest import EXAMPLES, demo_text
from ui.exportview import exports_html
from ui.importer import opened

LLM = "llmcompressor"


def rows(text: str) -> dict[str, str]:
    shown = exports_html(text, "mine")
    return dict(re.findall(r'<li data-target="(\w+)">(.*?)</li>', shown, re.DOTALL))


def file_of(row: str) -> tuple[str, str]:
    name, address = re.search(r'download="([^"]+)" href="data:application/yaml;charset=utf-8,([^"]*)"', row).groups()
    return name, unquote(html.unescape(address))


@pytest.mark.parametrize(
    ("example", "possible"),
    [("awq_guide", {"nyuntam", LLM}), ("aqlm_guide", {"nyuntam"}), ("tensorrtllm_guide", {"nyuntam"}),
     ("llmcompressor_guide", {LLM}), ("native_demo", set())],
)  # fmt: skip
def test_each_guide_is_offered_where_it_can_go(example, possible):
    text = opened((EXAMPLES / f"{example}.yaml").read_text(encoding="utf-8"), example)[0].text
    for target, row in rows(text).items():
        if target in possible:
            suffix = "nyuntam" if target == "nyuntam" else "recipe"
            assert file_of(row) == (f"mine.{suffix}.yaml", export_text(text, target)) and "Not possible" not in row
        else:
            assert "Not possible" in row and "download=" not in row


def test_what_is_lost_stands_beside_the_link():
    row = rows(demo_text())["nyuntam"]
    assert "Left out, since it has no such keys: CALIBRATION, EVALUATION, BENCHMARK." in row
    assert "MODEL quantdeck/demo is only here" in row


def test_nothing_of_a_file_becomes_html():
    evil = "<img src=x onerror=alert(1)>"
    shown = exports_html(demo_text(MODEL=evil, llm={"AutoAWQ": {"W_BIT": [4, 3]}}) + f'"{evil}": 1\n', evil)
    assert "<img" not in shown
