"""New job, `/new`: the form made from the schema, beside a live review of the job file it makes.

`/new?clone=UID` opens the settings of an existing job.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from backend.errors import ConfigError, ConfigErrors, QuantdeckError
from backend.jobs import control
from backend.paths import Home
from backend.schema import ALGORITHMS, DEMO, Group, parse_yaml
from backend.schema.aqlm_finetune import TUNING_TEXT
from backend.sources.models import list_models
from ui.datapreview import DataPreview
from ui.differences import differences
from ui.draft import FIELDS, TEMPLATE, Draft, open_draft
from ui.examples import demo_values, example_text, examples
from ui.exportview import exports_html
from ui.fields import Form, fields_of
from ui.importer import REPORT, Importer, only_changes, opened, unopened
from ui.layout import esc, notice, page, title
from ui.marks import mark, messages_by_key
from ui.modelpicker import ModelPicker
from ui.review import command_html, review, review_html
from ui.visible import Visibility
from ui.yamlview import yaml_html

DATASETS = (
    ("Built-in demo text", DEMO),
    ("wikitext (Hub)", "wikitext"),
    ("GSM8K, each question and its answer as one text: the guides' create_dataset (Hub)", "gsm8k_restructured"),
)
SUITED = "Its own defaults are the guide's, for models of billions of parameters."
TUNING_DATASET = "llm.AQLM.FINETUNE_DATA.DATASET_NAME"
TUNING_DATASETS = (("The calibration text", ""), *DATASETS)
LOOK, STILL_MS = "look", 150
LOOK_SOON = f"""() => {{
  clearTimeout(window.quantdeckLook);
  window.quantdeckLook = setTimeout(() => document.getElementById('{LOOK}')?.click(), {STILL_MS});
}}"""
GO_TO_JOB = "(uid) => { if (uid) window.location.assign('/job?id=' + encodeURIComponent(uid)); }"


def build(demo: gr.Blocks, home: Home) -> None:
    """Adds the page to `demo`."""
    models = [(f"{entry.id} ({entry.note})", entry.id) for entry in list_models(home)]
    first = open_draft(TEMPLATE)
    with page("new"):
        gr.HTML(
            title(
                "New job",
                "Choose a model, a text to calibrate on, and how to quantize. Each setting is a line of the job file.",
            )
        )
        example = gr.Dropdown(
            choices=examples(), value=None, label="Start from an example", elem_id="example",
            info="Fills the form with a job file that comes with Quantdeck; the guides' files among them.",
        )  # fmt: skip
        told = gr.HTML(visible=False, elem_id=REPORT)
        with gr.Row(elem_classes=["qd-split"]):
            with gr.Column(scale=3, min_width=420):
                form = Form(first.shown, {"MODEL": models, "DATASET_NAME": DATASETS, TUNING_DATASET: TUNING_DATASETS})
                picker, sections, previews = _form_sections(form, str(_shown(first, "ALGORITHM")))
            with gr.Column(scale=2, min_width=340, elem_classes=["qd-side"]):
                start = gr.Button("Start job", variant="primary", elem_id="start")
                refused = gr.HTML(visible=False)
                summary = gr.HTML(elem_id="review")
                yaml = gr.HTML(elem_id="yaml")
                command = gr.HTML()
                importer = Importer()
    draft = gr.State(first)
    wrong = gr.State({})  # what is written at which control
    filled = gr.State(0)  # how often the whole form was filled
    created = gr.Textbox(visible=False)
    look = gr.Button("Look at the form", visible="hidden", elem_id=LOOK)
    controls = form.ordered()
    opening: dict[str, Any] = {
        "outputs": [draft, told, *controls],
        "show_progress": "hidden",
        "api_visibility": "private",
    }

    def on_load(request: gr.Request) -> list[Any]:
        uid = request.query_params.get("clone")
        try:
            if uid:
                return only_changes(opened(control.clone_text(home, uid), f"A copy of job {uid}"), first.shown)
            text = control.with_free_name(home, parse_yaml(TEMPLATE)).dump()
        except QuantdeckError as error:
            return unopened(notice("error", "The form starts empty", error.message))
        found = open_draft(text)
        return only_changes([found, gr.skip(), *found.shown], first.shown)

    def on_example(name: str | None, *present: Any) -> list[Any]:
        if not name:
            return unopened()
        try:
            text = control.with_free_name(home, parse_yaml(example_text(name))).dump()
        except QuantdeckError as error:
            return unopened(notice("error", "The example was not opened", error.message))
        return only_changes(opened(text, f"{name}.yaml"), present)

    def on_change(now: Draft, before: dict[str, str], *values: Any) -> list[Any]:
        found = review(home, now, values)
        wrong = messages_by_key(found.problems, now, values)
        marks = [mark(field, wrong.get(field.key), before.get(field.key)) for field in FIELDS]
        shown = yaml_html(found.text, found.file_name, "Job file, as it will be saved", differences(found.text))
        others = exports_html(found.text, Path(found.file_name).stem) if found.config else ""
        return [review_html(found), shown, command_html(found) + others, wrong, *marks]

    def on_algorithm(chosen: str | None) -> list[Any]:
        return [gr.update(visible=name == chosen) for name in sections]

    def on_chosen(chosen: str | None, *values: Any) -> list[Any]:
        found = demo_values(str(chosen), dict(zip((f.key for f in FIELDS), values, strict=True)))
        said = gr.HTML(notice("info", f"{chosen} with sizes that suit the demo model", SUITED), visible=True)
        return [said if found else gr.skip(), *(found.get(field.key, gr.skip()) for field in FIELDS)]

    def on_start(now: Draft, *values: Any) -> tuple[Any, Any]:
        found = review(home, now, values)
        try:
            if found.problems:
                raise ConfigErrors([ConfigError(message, key=key) for _, key, message in found.problems])
            return control.submit(home, found.text, confined=True).uid, gr.HTML(visible=False)
        except QuantdeckError as error:
            return "", gr.HTML(notice("error", "The job was not started", error.message), visible=True)

    def on_filled(before: int) -> int:
        return before + 1

    for text_preview in previews:
        text_preview.connect(home, draft, controls)
    filling = [
        demo.load(on_load, None, **opening),
        example.input(on_example, [example, *controls], **opening),
        form.controls["ALGORITHM"].input(
            on_chosen, [form.controls["ALGORITHM"], *controls], [told, *controls],
            show_progress="hidden", api_visibility="private",
        ),
        *importer.connect(controls, opening),
    ]  # fmt: skip
    for event in filling:
        # In the queue: outside of it nobody hears of a changed State.
        event.then(on_filled, [filled], [filled], show_progress="hidden", api_visibility="private")
    # Many controls change at once: they are looked at together, once they stand still. Not after the choice of an
    # algorithm alone, whose sizes for the demo model are on their way then.
    settling = [c.change for c in controls if c is not form.controls["ALGORITHM"]]
    gr.on(settling, None, None, None, js=LOOK_SOON, api_visibility="private")
    checked = gr.on(
        [look.click, filled.change, picker.facts.change],  # the Hub tells late
        on_change, [draft, wrong, *controls], [summary, yaml, command, wrong, *controls],
        trigger_mode="always_last", show_progress="hidden", queue=False, api_visibility="private",
    )  # fmt: skip
    Visibility(form, first).connect(wrong, checked)
    gr.on(
        [demo.load, form.controls["ALGORITHM"].change],
        on_algorithm, [form.controls["ALGORITHM"]], list(sections.values()),
        trigger_mode="always_last", show_progress="hidden", queue=False, api_visibility="private",
    )  # fmt: skip
    picker.connect(demo, home, form.controls)
    start.click(
        on_start, [draft, *controls], [created, refused], show_progress="minimal", api_visibility="private"
    ).success(None, [created], None, js=GO_TO_JOB, api_visibility="private")


def _shown(draft: Draft, key: str) -> Any:
    """What the control of a setting shows for a draft."""
    return next(value for field, value in zip(FIELDS, draft.shown, strict=True) if field.key == key)


def _form_sections(form: Form, algorithm: str) -> tuple[ModelPicker, dict[str, gr.Column], list[DataPreview]]:
    """Lays out all settings.

    Args:
        form: The form.
        algorithm: The one whose section is shown at first.

    Returns:
        The picker of the model; the section of each algorithm, where hidden ones keep their
        values; and the previews of the texts.
    """
    with gr.Column(elem_classes=["qd-form"]):
        _heading("Model", "What is quantized.")
        form.one("MODEL")
        picker = ModelPicker()
        with form.fold("Local folder, the model's own code"):
            form.section("Model")
    with gr.Column(elem_classes=["qd-form"]):
        _heading(
            "Calibration text", "What the model reads while its scales are chosen. Text like that of your use is best."
        )
        form.section("Dataset", advanced=False)
        form.section("Calibration", advanced=False)
        with form.fold("Local data, format string, order"):
            form.section("Dataset")
            form.section("Calibration")
        previews = [DataPreview()]
    with gr.Column(elem_classes=["qd-form"]):
        _heading("Algorithm", "How the weights become smaller.")
        form.section("Algorithm")
        sections = {name: _algorithm_section(form, name, previews, visible=name == algorithm) for name in ALGORITHMS}
    with gr.Column(elem_classes=["qd-form"]):
        _heading("Measurements", "Taken from the baseline and from the saved result, in the same way, after saving.")
        form.section("Evaluation", advanced=False)
        with form.fold("Perplexity text, window and batch"):
            form.section("Evaluation")
        form.section("Benchmark", advanced=False)
        with form.fold("Benchmark lengths and repetitions"):
            form.section("Benchmark")
    with gr.Column(elem_classes=["qd-form"]):
        _heading("Job", "")
        form.section("Job", advanced=False)
        with form.fold("Folders and fixed keys"):
            form.section("Job")
        with form.fold("Keys kept for other programs"):
            form.section("Job", ignored=True)
    return picker, sections, previews


def _algorithm_section(form: Form, name: str, previews: list[DataPreview], *, visible: bool) -> gr.Column:
    groups = ALGORITHMS[name].GROUPS or (Group(name),)
    with gr.Column(visible=visible, elem_id=f"algorithm-{name}") as section:
        for group in groups:
            if group.heading:
                with form.fold(group.heading):
                    _group(form, group)
                    if group.section == TUNING_TEXT:
                        previews.append(DataPreview("tuning"))
            else:
                _group(form, group)
    return section


def _group(form: Form, group: Group) -> None:
    """Lays out the settings of a group, the advanced ones folded away if there are others."""
    if group.lead:
        gr.HTML(f'<p class="qd-muted qd-small">{esc(group.lead)}</p>')
    simple, all_of_them = (fields_of(group.section, advanced=only, ignored=group.ignored) for only in (False, None))
    form.place(simple or all_of_them)
    if len(simple) < len(all_of_them) and simple:
        with form.fold("More"):
            form.place(all_of_them)


def _heading(text: str, lead: str) -> None:
    below = f"<p>{lead}</p>" if lead else ""
    gr.HTML(f'<div class="qd-section"><h2>{text}</h2>{below}</div>')
