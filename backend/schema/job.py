"""The job file: the guides' top-level YAML keys, with the same names, case and meaning.

Keys that the original system reads are honoured. `JOB_PATH` and `ALGO_TYPE`, which it never reads, are kept
in the file and marked `ignored`. `CALIBRATION`, `EVALUATION`, `BENCHMARK`, `REVISION`,
`TRUST_REMOTE_CODE`, `PRIORITY`, `MAX_ATTEMPTS` and `TIME_LIMIT_HOURS` are Quantdeck's own.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, field_validator, model_validator

from backend.errors import ConfigError, ConfigErrors
from backend.schema.aqlm import AQLMSettings
from backend.schema.autoawq import AutoAWQSettings
from backend.schema.errors import ProblemAt
from backend.schema.facts import GUIDES, NYUNTAM, OWN, unless, when
from backend.schema.fields import drop_empty, setting
from backend.schema.llmcompressor import LLMCompressorSettings
from backend.schema.measurement import BenchmarkSettings, CalibrationSettings, EvaluationSettings
from backend.schema.native import NativeSettings
from backend.schema.tensorrtllm import TensorRTLLMSettings
from backend.schema.texts import DEMO, GSM8K_PRESET, check_columns, check_format, column_names

GUIDE_ROOT = "/user_data"
"""Where the TensorRT-LLM guide's container has the user's folder: that of the home, here."""
JOB_ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")

NO_COLUMNS = (None, DEMO, GSM8K_PRESET)
"""Datasets whose columns and subset are known, and none."""
OWN_COLUMNS = (unless("DATA_PATH", None), unless("DATASET_NAME", *NO_COLUMNS))

REVISION_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,99}")

AlgorithmSettings = AutoAWQSettings | NativeSettings | LLMCompressorSettings | AQLMSettings | TensorRTLLMSettings
ALGORITHMS: dict[str, type[AlgorithmSettings]] = {
    "AutoAWQ": AutoAWQSettings,
    "Native": NativeSettings,
    "LLMCompressor": LLMCompressorSettings,
    "AQLM": AQLMSettings,
    "TensorRTLLM": TensorRTLLMSettings,
}


def is_revision(text: str) -> bool:
    """Whether a text can name a branch, tag or commit of a repository on the Hub."""
    return REVISION_PATTERN.fullmatch(text) is not None and ".." not in text and "//" not in text


class AlgorithmSections(BaseModel):
    """The `llm:` section: one sub-section per algorithm, of which `ALGORITHM` picks one."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    AutoAWQ: AutoAWQSettings | None = None
    Native: NativeSettings | None = None
    LLMCompressor: LLMCompressorSettings | None = None
    AQLM: AQLMSettings | None = None
    TensorRTLLM: TensorRTLLMSettings | None = None


class JobConfig(BaseModel):
    """One quantization job."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    # -- model
    MODEL: str = setting(
        label="Model", section="Model", source=GUIDES,
        help=f"A model id on the Hub, a local folder, or '{DEMO}' for the built-in model.",
    )  # fmt: skip
    CUSTOM_MODEL_PATH: str | None = setting(
        None, label="Local folder", section="Model", source=NYUNTAM, advanced=True,
        help="Folder with config.json and safetensors files, used instead of MODEL's download.",
    )  # fmt: skip
    REVISION: str | None = setting(
        None, label="Revision", section="Model",
        source=OWN, visible_when=[unless("MODEL", DEMO), when("CUSTOM_MODEL_PATH", None)],
        advanced=True,
        help="Branch, tag or commit of a Hub model. Empty: the newest of its main branch; a commit never changes.",
    )  # fmt: skip
    TRUST_REMOTE_CODE: StrictBool = setting(
        False, label="Run the model's own code", section="Model", source=OWN, advanced=True,
        help="For models that bring Python code of their own. That code gets all rights of the user that runs "
        "Quantdeck: read it first. The operator has to allow it too.",
    )  # fmt: skip
    # -- calibration text
    DATASET_NAME: str | None = setting(
        None, label="Dataset", section="Dataset", source=GUIDES,
        help=f"A dataset id on the Hub, or '{DEMO}' for the built-in text. Calibrates the quantizer.",
    )  # fmt: skip
    DATASET_SUBNAME: str | None = setting(
        None,
        label="Subset",
        section="Dataset",
        source=GUIDES,
        visible_when=[when("DATA_PATH", None), unless("DATASET_NAME", *NO_COLUMNS)],
        help="Subset (configuration) of the dataset, e.g. wikitext-2-raw-v1.",
    )
    TEXT_COLUMN: str = setting(
        "text", label="Text column", section="Dataset", source=GUIDES, visible_when=[OWN_COLUMNS],
        help="Column with the text; several, separated by commas, need a format string.",
    )  # fmt: skip
    SPLIT: str = setting(
        "train", label="Split", section="Dataset", source=GUIDES, help="Split that is read, e.g. train."
    )
    DATA_PATH: str | None = setting(
        None, label="Local data", section="Dataset", source=GUIDES, advanced=True,
        help="Local dataset instead of DATASET_NAME's download: a folder saved by datasets (save_to_disk), "
        "or a .jsonl, .csv, .parquet or .txt file.",
    )  # fmt: skip
    FORMAT_STRING: str | None = setting(
        None, label="Format string", section="Dataset",
        source=GUIDES, visible_when=[(unless("DATA_PATH", None), unless("DATASET_NAME", GSM8K_PRESET))],
        advanced=True,
        help="Template over the text columns, e.g. \"Question: {question}\\nAnswer: {answer}\".",
    )  # fmt: skip
    llm: AlgorithmSections = Field(default_factory=AlgorithmSections)
    # -- job
    CUDA_ID: str = setting(
        "0", label="GPU", section="Job", source=GUIDES,
        help="Number of the GPU to use, or several with commas. Without a GPU the job runs on the CPU and says so.",
    )  # fmt: skip
    ALGORITHM: Literal["AutoAWQ", "Native", "LLMCompressor", "AQLM", "TensorRTLLM"] = setting(
        label="Algorithm", section="Algorithm", source=GUIDES,
        help="AutoAWQ is the guide's 4-bit AWQ. Native is Quantdeck's own core: RTN, AWQ, GPTQ or AWQ+GPTQ at 2 to 8 "
        "bits. LLMCompressor runs the recipes of the llm-compressor package. AQLM is the guide's 2-bit quantization "
        "by codebooks, with tuning afterwards. TensorRTLLM quantizes for NVIDIA's TensorRT-LLM, and runs in it.",
    )  # fmt: skip
    JOB_SERVICE: Literal["Kompress"] = setting(
        "Kompress", label="Service", section="Job", source=GUIDES, advanced=True,
        help="Part of the output path: user_data/jobs/<JOB_SERVICE>/<JOB_ID>.",
    )  # fmt: skip
    USER_FOLDER: str = setting(
        "user_data", label="User folder", section="Job", source=GUIDES, advanced=True,
        help="Folder for everything jobs write, relative to the home folder.",
    )  # fmt: skip
    JOB_ID: str = setting(
        label="Job name", section="Job", source=GUIDES,
        help="Name of the job and of its output folder; letters, digits, '.', '_' and '-'. Each name is used once.",
    )  # fmt: skip
    CACHE_PATH: str | None = setting(
        None, label="Download cache", section="Job", source=GUIDES, advanced=True,
        help="Folder for downloads, relative to the home folder. Empty: USER_FOLDER/.cache.",
    )  # fmt: skip
    JOB_PATH: str | None = setting(
        None, label="Job path", section="Job", source=GUIDES, advanced=True, ignored=True,
        help="Kept in the file; neither the original system nor Quantdeck reads it.",
    )  # fmt: skip
    LOGGING_PATH: str | None = setting(
        None, label="Log folder", section="Job", source=GUIDES, advanced=True,
        help="Folder for log.log, relative to the home folder. Empty: USER_FOLDER/logs/<JOB_ID>.",
    )  # fmt: skip
    ALGO_TYPE: str | None = setting(
        None, label="Algorithm type", section="Job", source=GUIDES, advanced=True, ignored=True,
        help="Kept in the file; neither the original system nor Quantdeck reads it.",
    )  # fmt: skip
    PRIORITY: StrictInt = setting(
        0, label="Priority", section="Job", source=OWN, advanced=True, unit="-100 to 100", ge=-100, le=100,
        help="Waiting jobs of a higher priority start first; those of the same one in the order they were made.",
    )  # fmt: skip
    MAX_ATTEMPTS: StrictInt = setting(
        3, label="Attempts", section="Job", source=OWN, advanced=True, unit="starts", ge=1, le=10,
        help="How often the job is started at most if its process dies or the machine restarts; "
        "each attempt goes on where the one before it stopped.",
    )  # fmt: skip
    TIME_LIMIT_HOURS: float | None = setting(
        None, label="Time limit", section="Job", source=OWN, advanced=True, unit="hours", ge=0.01, le=10_000,
        help="The job is stopped after this time. Empty: no limit.",
    )  # fmt: skip
    TASK: Literal["llm"] = setting(
        "llm",
        label="Task",
        section="Job",
        source=GUIDES,
        advanced=True,
        help="Kind of model; Quantdeck quantizes language models.",
    )
    CALIBRATION: CalibrationSettings = Field(default_factory=CalibrationSettings)
    EVALUATION: EvaluationSettings = Field(default_factory=EvaluationSettings)
    BENCHMARK: BenchmarkSettings = Field(default_factory=BenchmarkSettings)

    @model_validator(mode="before")
    @classmethod
    def _empty_is_unset(cls, values: Any) -> Any:
        # The guides write both `DATA_PATH:` and `DATASET_SUBNAME: ""` for "not given".
        return _chosen_section_only(drop_empty(values))

    @field_validator("CUDA_ID", mode="before")
    @classmethod
    def _cuda_id(cls, value: Any) -> str:
        text = str(value).strip() if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
        if not re.fullmatch(r"\d{1,3}(\s*,\s*\d{1,3})*", text):
            raise ValueError('write GPU numbers in quotes, e.g. "0" or "0,1"')
        return re.sub(r"\s", "", text)

    @field_validator("JOB_ID", mode="before")
    @classmethod
    def _job_id(cls, value: Any) -> str:
        text = str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else ""
        if not JOB_ID_PATTERN.match(text) or ".." in text:
            raise ValueError(
                "a job name starts with a letter or digit, has only letters, digits, '.', '_' and '-', "
                "no '..', and at most 100 characters, since it becomes a folder's name"
            )
        return text

    @field_validator("REVISION", mode="before")
    @classmethod
    def _revision(cls, value: Any) -> str | None:
        text = str(value).strip() if isinstance(value, (str, int)) and not isinstance(value, bool) else value
        if text is not None and (not isinstance(text, str) or not is_revision(text)):
            raise ValueError(
                "write a branch, tag or commit: at most 100 letters, digits, '.', '_', '-' and '/', beginning with a "
                "letter or digit, without '..'; in quotes if it is a number"
            )
        return text

    @field_validator("USER_FOLDER", "CACHE_PATH", "LOGGING_PATH")
    @classmethod
    def _inside_home(cls, value: str | None) -> str | None:
        if value is not None and PurePosixPath(value).parts[:2] == PurePosixPath(GUIDE_ROOT).parts:
            value = value.lstrip("/")
        if value is not None and (PurePosixPath(value).is_absolute() or ".." in PurePosixPath(value).parts):
            raise ValueError("write a folder inside the home folder, without a leading '/' and without '..'")
        return value

    @field_validator("TEXT_COLUMN")
    @classmethod
    def _columns(cls, value: str) -> str:
        return check_columns(value)

    @model_validator(mode="after")
    def _across_fields(self) -> JobConfig:
        if not self.DATASET_NAME and not self.DATA_PATH:
            raise ValueError(f"DATASET_NAME: give a dataset, '{DEMO}' for the built-in text, or DATA_PATH")
        check_format(self.FORMAT_STRING, self.text_columns)
        self.algorithm_settings.check_job(self.calibration, n_gpus=len(self.CUDA_ID.split(",")))
        return self

    @property
    def text_columns(self) -> list[str]:
        """Names of the text columns, trimmed."""
        return column_names(self.TEXT_COLUMN)

    @property
    def calibration(self) -> CalibrationSettings:
        """How much calibration text is read: CALIBRATION, and what the algorithm's section says instead of it."""
        own = self.algorithm_settings.calibration_size
        return self.CALIBRATION.model_copy(
            update={key: value for key, value in own.items() if key not in self.CALIBRATION.model_fields_set}
        )

    def check_sequences(self, found: int) -> None:
        """Check the settings again once it is known how many calibration sequences the text really makes.

        Raises:
            ConfigErrors: If fewer than were asked for are not enough.
        """
        calibration = self.calibration.model_copy(update={"SAMPLES": found})
        try:
            self.algorithm_settings.check_job(calibration, n_gpus=len(self.CUDA_ID.split(",")))
        except ProblemAt as error:
            raise ConfigErrors([ConfigError(str(error), key=error.key, value=error.value)]) from None

    @property
    def algorithm_settings(self) -> AlgorithmSettings:
        """Settings of the chosen algorithm; its defaults where the file has no section for it."""
        return getattr(self.llm, self.ALGORITHM) or ALGORITHMS[self.ALGORITHM]()

    @property
    def is_demo(self) -> bool:
        """True if the built-in model is quantized."""
        return self.MODEL == DEMO and not self.CUSTOM_MODEL_PATH


def _chosen_section_only(values: Any) -> Any:
    """The file without the sections of other algorithms: nothing reads them, so nothing in them can be wrong."""
    if not isinstance(values, dict):
        return values
    chosen, sections = values.get("ALGORITHM"), values.get("llm")
    if not isinstance(sections, dict) or not isinstance(chosen, str) or chosen not in ALGORITHMS:
        return values
    return {**values, "llm": {name: section for name, section in sections.items() if name == chosen}}
