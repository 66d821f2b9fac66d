"""The preview on the New job page: its button's handler through the real app, and what it shows."""

from __future__ import annotations

import pytest

from backend.paths import Home
from tests.conftest import write_jsonl
from tests.security.site import call, outcome, running
from ui.datapreview import answer, length_chart, preview_html
from ui.draft import FIELDS, TEMPLATE, open_draft

HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    with running(Home(tmp_path_factory.mktemp("home"))) as found:
        yield found


def press(site, name="on_preview", *, which=0, **changes):
    """What a button's handler answers for the template with some values changed; `which` 1 is the tuning text's."""
    index = [i for i, fn in site.blocks.fns.items() if fn.name == name][which]
    values = {field.key: value for field, value in zip(FIELDS, open_draft(TEMPLATE).shown, strict=True)}
    data = [None, *({**values, **changes}[field.key] for field in FIELDS)]
    session = f"{name}{which}{len(changes)}{''.join(changes)}"
    with site.client() as client:
        assert call(client, index, data, session).status_code == 200
        last = outcome(client, session)[-1]
    assert last["success"], last
    return last["output"]["data"]


def shown(data):
    return data[0]["value"] if isinstance(data[0], dict) else data[0]


def test_the_button_shows_rows_and_a_chart(site):
    data = press(site)
    html = shown(data)
    assert '<span class="qd-token" title="special token">&lt;|begin|&gt;</span>' in html
    assert "Row 5" in html and "Row 6" not in html and "128 of 128 sequences of 512 tokens" in html
    assert data[1]["visible"] is True and data[2]["visible"] is False


def test_a_dataset_of_the_hub_waits_to_be_asked_for(site):
    data = press(site, DATASET_NAME="nobody/nothing")
    assert "not on this machine" in shown(data)
    assert data[1]["visible"] is False and data[2]["visible"] is True


def test_no_text_yet_says_what_to_choose(site):
    assert "No text chosen yet" in shown(press(site, DATASET_NAME=""))


def test_the_tuning_text_has_a_preview_of_its_own(site):
    folder = site.home.user_data / "models"
    folder.mkdir(parents=True, exist_ok=True)
    path = write_jsonl(folder / "tuning.jsonl", [{"text": f"line {n} of {HOSTILE}"} for n in range(200)])
    tune = "llm.AQLM.finetune_config"
    own = {"llm.AQLM.FINETUNE_DATA.DATA_PATH": str(path), f"{tune}.model_seqlen": 64, f"{tune}.batch_size": 2}
    data = press(site, which=1, **own)
    assert "line 0 of" in shown(data) and "<img" not in shown(data) and "decide which step is kept" in shown(data)
    assert data[1]["visible"] is True
    assert "line 0 of" not in shown(press(site, **own))
    refused = shown(press(site, which=1, **{"llm.AQLM.FINETUNE_DATA.DATA_PATH": "/etc/passwd"}))
    assert "llm.AQLM.FINETUNE_DATA.DATA_PATH" in refused and "inside" in refused
    assert press(site, which=1, **{"llm.AQLM.FINETUNE_DATA.DATASET_NAME": "nobody/nothing"})[2]["visible"] is True


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"TEXT_COLUMN": "story"}, "it has text"),
        ({"SPLIT": "dev"}, "train, validation, test"),
        ({"DATA_PATH": "/etc/passwd"}, "inside"),
        ({"FORMAT_STRING": "{title}"}, "is not among TEXT_COLUMN"),
    ],
)
def test_what_cannot_be_read_is_told(site, changes, words):
    html = shown(press(site, **changes))
    assert 'role="alert"' in html and words in html and "root:x" not in html


def test_what_the_data_holds_never_becomes_html(site):
    folder = site.home.user_data / "models"
    folder.mkdir(parents=True, exist_ok=True)
    path = write_jsonl(folder / "evil.jsonl", [{HOSTILE: HOSTILE, "text": f"{HOSTILE}\u202e"}])
    for changes in ({}, {"TEXT_COLUMN": "other"}):
        html = shown(press(site, DATA_PATH=str(path), **changes))
        assert "<img" not in html and "&lt;img" in html and "\u202e" not in html


def test_the_chart_has_every_row_and_the_length_where_rows_are_cut(home):
    draft = open_draft(TEMPLATE + "CALIBRATION: {PACKING: sample, SEQUENCE_LENGTH: 200, SAMPLES: 32}\n")
    chart = answer(home, draft, draft.shown, online=False)[1].value
    assert "rows" in str(chart)
    from backend.schema import parse_yaml
    from backend.sources.preview import preview, preview_config

    found = preview(preview_config(parse_yaml(draft.text)), home, rows=1)
    figure = length_chart(found)
    assert sum(figure.data[0].y) == len(found.lengths)
    assert figure.layout.shapes[0].x0 == 200
    assert "Look at this first" in preview_html(found)  # rows of more than 200 tokens
