"""The job file's schema: the one source of forms, YAML, validation and docs."""

from backend.errors import ConfigError, ConfigErrors
from backend.schema.aqlm import AQLMSettings
from backend.schema.aqlm_finetune import FinetuneData
from backend.schema.autoawq import AutoAWQSettings
from backend.schema.document import (
    ALGORITHMS,
    SECTIONS,
    Document,
    new_document,
    parse_file,
    parse_yaml,
    read_yaml,
)
from backend.schema.fields import FieldSpec, Group, describe, sections
from backend.schema.job import AlgorithmSettings, JobConfig
from backend.schema.llmcompressor import LLMCompressorSettings
from backend.schema.measurement import BenchmarkSettings, CalibrationSettings, EvaluationSettings, TaskSettings
from backend.schema.native import NativeSettings, OverrideSettings
from backend.schema.tensorrtllm import TensorRTLLMSettings
from backend.schema.texts import DEMO

__all__ = [
    "ALGORITHMS",
    "DEMO",
    "SECTIONS",
    "AQLMSettings",
    "AlgorithmSettings",
    "AutoAWQSettings",
    "BenchmarkSettings",
    "CalibrationSettings",
    "ConfigError",
    "ConfigErrors",
    "Document",
    "EvaluationSettings",
    "FieldSpec",
    "FinetuneData",
    "Group",
    "JobConfig",
    "LLMCompressorSettings",
    "NativeSettings",
    "OverrideSettings",
    "TaskSettings",
    "TensorRTLLMSettings",
    "describe",
    "new_document",
    "parse_file",
    "parse_yaml",
    "read_yaml",
    "sections",
]
