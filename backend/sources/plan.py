"""What a job file means in concrete terms: which text, which tasks. `auto` and empty values are decided here."""

from __future__ import annotations

from pathlib import Path

from backend.demo import TASK_NAME
from backend.errors import ConfigError, ConfigErrors
from backend.paths import Home
from backend.schema import DEMO, JobConfig, TaskSettings
from backend.schema.measurement import AUTO
from backend.sources.texts import TextSource

GUIDE_TEXT = ("wikitext", "wikitext-2-raw-v1")
GUIDE_TASK = TaskSettings(NAME="arc_challenge", NUM_FEWSHOT=25)


def calibration_source(config: JobConfig, home: Home, *, confined: bool = False) -> TextSource:
    """The calibration text.

    Args:
        config: The job.
        home: A relative DATA_PATH starts here.
        confined: True for requests of the web page: DATA_PATH must lie inside the home.

    Raises:
        ConfigErrors: If DATA_PATH does not exist. There is no silent fall-back to a download.
    """
    path: Path | None = None
    if config.DATA_PATH:
        path = home.root / Path(config.DATA_PATH).expanduser()
        if confined and not path.resolve().is_relative_to(home.root):
            message = f"found {config.DATA_PATH!r}; from this page only data inside {home.root} can be used"
            raise ConfigErrors([ConfigError(message, key="DATA_PATH", value=config.DATA_PATH)])
        if not path.exists():
            message = f"found {config.DATA_PATH!r}, but {path} does not exist; leave it empty to use DATASET_NAME"
            raise ConfigErrors([ConfigError(message, key="DATA_PATH", value=config.DATA_PATH)])
    return TextSource(
        config.DATASET_NAME,
        config.DATASET_SUBNAME,
        config.SPLIT,
        tuple(config.text_columns),
        config.FORMAT_STRING,
        path,
    )


def evaluation_source(config: JobConfig) -> TextSource:
    """The text on which perplexity is measured: the one named, else the demo's or the guides' own."""
    settings = config.EVALUATION
    if settings.DATASET_NAME != AUTO:
        return TextSource(settings.DATASET_NAME, settings.DATASET_SUBNAME, settings.SPLIT, (settings.TEXT_COLUMN,))
    if config.is_demo:
        return TextSource(DEMO, None, "test", ("text",))
    return TextSource(*GUIDE_TEXT, "test", ("text",))


def evaluation_tasks(config: JobConfig) -> list[TaskSettings]:
    """The accuracy tasks: those named, else the demo task for the demo model, the guide's for any other."""
    if config.EVALUATION.TASKS is not None:
        return list(config.EVALUATION.TASKS)
    return [TaskSettings(NAME=TASK_NAME)] if config.is_demo else [GUIDE_TASK]
