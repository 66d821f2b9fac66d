"""The job files that come with Quantdeck, as starting points of the form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backend.errors import QuantdeckError
from backend.paths import PROJECT
from backend.schema import DEMO, parse_yaml
from ui.draft import FIELDS, FormField, to_control

FOLDER = PROJECT / "examples"
OF_ALGORITHM = {"AQLM": "aqlm_demo", "TensorRTLLM": "tensorrtllm_demo"}
"""Algorithms whose own defaults are too large for the demo model -> the example whose values suit it."""


def examples() -> list[tuple[str, str]]:
    """What each example is, by the first line of its file, and its name."""
    return [(_about(path), path.stem) for path in sorted(FOLDER.glob("*.yaml"))]


def _about(path: Path) -> str:
    text = path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")
    said = text if not text.endswith(".yaml") else "the guide's own file"
    return f"{path.stem}: {said.partition(':')[0].rstrip('.')}"


def example_text(name: str) -> str:
    """The text of an example.

    Raises:
        QuantdeckError: If there is none of that name.
    """
    if name not in {known for _, known in examples()}:
        raise QuantdeckError(f"there is no example {name!r}")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def demo_values(algorithm: str, shown: dict[str, Any]) -> dict[str, Any]:
    """Values that suit the demo model, for settings of an algorithm that still show their default.

    Args:
        algorithm: The one that was chosen.
        shown: What the form's controls show, by dotted key.

    Returns:
        By dotted key; empty for another model, or an algorithm whose defaults suit it.
    """
    name = OF_ALGORITHM.get(algorithm)
    if name is None or shown.get("MODEL") != DEMO or (shown.get("CUSTOM_MODEL_PATH") or "").strip():
        return {}
    example = parse_yaml(example_text(name)).values
    found = {}
    for field in FIELDS:
        if field.path[:2] != ("llm", algorithm) or shown.get(field.key) != default_shown(field):
            continue
        value: Any = example
        for key in field.path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found[field.key] = to_control(field.spec, value)
    return found


def default_shown(field: FormField) -> Any:
    """What a control shows for a file without its key."""
    return to_control(field.spec, field.spec.default)
