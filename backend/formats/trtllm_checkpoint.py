"""Rotary positions in configurations for TensorRT-LLM 1.2.1, which reads the keys of older releases of transformers.

transformers 5 keeps the base and the scaling of rotary positions in `rope_parameters`. nvidia-modelopt 0.47 looks for
the older keys only, so that its TensorRT-LLM checkpoints lack `rotary_base`, and TensorRT-LLM takes 10000 without a
word; the same happens to a Hugging Face folder there, which is read with transformers 4.57.

Sources: TensorRT-LLM 1.2.1, configuration of its Llama models and its attention layer. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backend.errors import ModelError

DEFAULT_BASE = 10000.0
SCALINGS: Mapping[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""Scalings that engines compute as transformers does -> the numbers that each needs. Those of `yarn` and `dynamic` have
a name there, but the attention layer multiplies yarn's frequencies by the factor, and asks for another number of
dynamic's."""
NOT_SCALING = ("rope_theta", "partial_rotary_factor", "rope_type", "type")


@dataclass(frozen=True)
class Rope:
    """Rotary positions of a model, all its layers alike.

    Attributes:
        base: theta.
        share: Of a head's dimensions, those that turn.
        kind: transformers' `rope_type`; `default` for no scaling.
        scaling: The numbers of the scaling.
    """

    base: float
    share: float
    kind: str
    scaling: Mapping[str, Any]

    @property
    def scaling_dict(self) -> dict[str, Any] | None:
        """As transformers 4 had it in `rope_scaling`; None without scaling."""
        return None if self.kind == "default" else {"rope_type": self.kind, **self.scaling}


def rope_of(config: Mapping[str, Any]) -> Rope | None:
    """The rotary positions that a config.json of any age asks for; None if it has no word of them.

    Raises:
        ModelError: If its layers differ, or a value is of no use.
    """
    parameters, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    if parameters is None and scaling is None and "rope_theta" not in config:
        return None
    for key, found in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if found is not None and not isinstance(found, dict):
            raise ModelError(f"config.json: {key} is {found!r}; it must be an object with rope_type and its numbers.")
    nested = parameters or scaling or {}
    kinds = [name for name, value in nested.items() if isinstance(value, dict)]
    if kinds:
        raise ModelError(
            f"config.json: rope_parameters differ by layer type ({', '.join(kinds)}); TensorRT-LLM 1.2.1's checkpoints "
            "have one rotary_base for all layers. Use BACKEND pytorch or another model."
        )
    if config.get("rope_local_base_freq") is not None:
        raise ModelError(
            f"config.json: rope_local_base_freq {config['rope_local_base_freq']!r} gives some layers another base; "
            "TensorRT-LLM 1.2.1's checkpoints have one rotary_base for all. Use BACKEND pytorch or another model."
        )
    base = _number("rope_theta", nested.get("rope_theta", config.get("rope_theta", DEFAULT_BASE)))
    share = nested.get("partial_rotary_factor", config.get("partial_rotary_factor", config.get("rotary_pct", 1.0)))
    kind = nested.get("rope_type", nested.get("type")) or "default"
    numbers = {key: value for key, value in nested.items() if key not in NOT_SCALING}
    return Rope(base, _number("partial_rotary_factor", share), str(kind), {} if kind == "default" else numbers)


def complete_config(checkpoint_config: Mapping[str, Any], model_config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a TensorRT-LLM checkpoint with `rotary_base`, `rotary_scaling` and `rotary_pct`.

    Args:
        checkpoint_config: As modelopt wrote it.
        model_config: config.json of the Hugging Face model.

    Raises:
        ModelError: If TensorRT-LLM 1.2.1 has no field for what the model does, or the two contradict each other.
    """
    completed = dict(checkpoint_config)
    rope = rope_of(model_config)
    if rope is None:
        if str(checkpoint_config.get("position_embedding_type", "")).startswith("rope"):
            raise ModelError(
                "config.json of the model has neither rope_parameters nor rope_theta, but TensorRT-LLM's checkpoint "
                "says that it has rotary positions; add rope_theta to config.json."
            )
        return completed
    if rope.kind != "default" and rope.kind not in SCALINGS:
        raise ModelError(
            f"config.json: rope_type {rope.kind!r} is none that engines of TensorRT-LLM 1.2.1 compute: default, "
            f"{', '.join(SCALINGS)}. Use BACKEND pytorch or another model."
        )
    for key in SCALINGS.get(rope.kind, ()):
        if key not in rope.scaling:
            raise ModelError(f"config.json: rope_type {rope.kind!r} needs {key}, which rope_parameters lack.")
        _number(key, rope.scaling[key])
    wanted = {"rotary_base": rope.base, "rotary_pct": rope.share}
    written = completed.get("rotary_base")
    if written and written != rope.base:
        raise ModelError(
            f"TensorRT-LLM's checkpoint says rotary_base {written!r}, but config.json of the model {rope.base!r}; "
            "export the checkpoint again."
        )
    completed.update(wanted)
    scaling = rope.scaling_dict
    completed["rotary_scaling"] = scaling and {"type": rope.kind, **scaling}  # the older name of the kind comes first
    return completed


def complete_hf_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that transformers before 5 reads like those since, with `rope_theta` and `rope_scaling` too.

    What is there stays; a configuration that the older keys cannot express (another base for each layer type) is
    returned as it is.

    Raises:
        ModelError: If a value is of no use.
    """
    completed = dict(config)
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        return completed
    if config.get("rope_local_base_freq") is not None:
        return completed
    rope = rope_of(config)
    assert rope is not None
    completed["rope_theta"] = rope.base
    if rope.kind != "default":
        completed["rope_scaling"] = rope.scaling_dict
    if rope.share != 1.0 or "partial_rotary_factor" in parameters:
        completed["partial_rotary_factor"] = rope.share
    return completed


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ModelError(f"config.json: {key} is {value!r}; it must be a positive number.")
    return float(value)
