"""The one hierarchy of errors that Quantdeck shows to people.

Every message says what was asked, what was found and what to do about it. The command line prints
`message` and exits (2 for `ConfigError`, 1 otherwise); a job stores it as its failure reason; a page
shows it beside the field or as a notice.
"""

from __future__ import annotations

from collections.abc import Sequence


class QuantdeckError(Exception):
    """Base of all errors meant for users.

    Args:
        message: One or more plain sentences: what was asked, what was found, what to do.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(QuantdeckError):
    """A setting is wrong, and no work was started.

    Args:
        message: What is wrong and what is allowed.
        key: Dotted path of the offending key, e.g. `llm.AutoAWQ.Q_GROUP_SIZE`; empty for the whole file.
        value: The value that was found.
        line: Line of the file in which the key stands, from 1; 0 if it does not, or that is not known.
    """

    def __init__(self, message: str, *, key: str = "", value: object = None, line: int = 0) -> None:
        where = f"line {line}: " if line else ""
        super().__init__(where + (f"{key}: {message}" if key else message))
        self.line = line
        self.key = key
        self.value = value
        self.detail = message


class ConfigErrors(ConfigError):
    """Several settings are wrong at once; all of them are reported together.

    Args:
        errors: The single errors, in the order of the file.
    """

    def __init__(self, errors: Sequence[ConfigError]) -> None:
        super().__init__("\n".join(error.message for error in errors))
        self.errors = list(errors)


class ModelError(QuantdeckError):
    """The model's folder, architecture or sizes cannot be used as asked."""


class CheckpointError(QuantdeckError):
    """A weight file is missing, truncated, corrupt, or of a kind that is refused (pickle)."""


class DataError(QuantdeckError):
    """Calibration or evaluation text is missing, empty or too short."""


class EngineError(QuantdeckError):
    """The engine of an algorithm cannot run here, or stopped with a failure."""


class JobError(QuantdeckError):
    """A job does not exist, or its state does not allow what was asked."""
