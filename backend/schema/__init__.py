"""The job file's schema: the one source of forms, YAML, validation and docs."""

from backend.errors import ConfigError, ConfigErrors
from backend.schema.autoawq import AutoAWQSettings
from backend.schema.document import (
    ALGORITHMS,
    SECTIONS,
    Document,
    new_document,
    parse_yaml,
    read_yaml,
)
from backend.schema.fields import FieldSpec, describe
from backend.schema.job import DEMO, JobConfig
from backend.schema.measurement import BenchmarkSettings, CalibrationSettings, EvaluationSettings, TaskSettings

__all__ = [
    "ALGORITHMS",
    "DEMO",
    "SECTIONS",
    "AutoAWQSettings",
    "BenchmarkSettings",
    "CalibrationSettings",
    "ConfigError",
    "ConfigErrors",
    "Document",
    "EvaluationSettings",
    "FieldSpec",
    "JobConfig",
    "TaskSettings",
    "describe",
    "new_document",
    "parse_yaml",
    "read_yaml",
]
