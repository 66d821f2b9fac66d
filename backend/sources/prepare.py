"""The `download` stage: everything from outside is fetched and checked before hours of work begin.

Run as `python -m backend.sources.prepare REQUEST.json RESULT.json` by a job's runner. It resolves the model
(downloading only safetensors, configuration and tokenizer files), reads and tokenizes the calibration text,
and writes the evaluation text to a file, so that later stages need no network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from backend.child import run_child
from backend.engines.llm_problems import check_llm
from backend.errors import ModelError
from backend.event_stream import EventWriter
from backend.paths import Home
from backend.quantize.recipe import Recipe
from backend.schema import JobConfig, parse_yaml
from backend.sources.calibration import token_sequences
from backend.sources.messages import row_encoder
from backend.sources.models import resolve_model
from backend.sources.plan import calibration_source, evaluation_source
from backend.sources.texts import read_calibration_rows, read_rows

WANTED_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]


def download_model(repo_id: str, cache_dir: Path) -> tuple[Path, str]:
    """Fetch a model from the Hub, without pickles and code.

    Returns:
        The snapshot folder and its commit.

    Raises:
        ModelError: If it does not exist, is gated, or the network is down; the message says which.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(repo_id, cache_dir=cache_dir, allow_patterns=WANTED_FILES))
    except GatedRepoError:
        raise ModelError(
            f"MODEL: {repo_id} is gated: accept its licence on its Hub page, then log in with `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"MODEL: the Hub has no model {repo_id}, or it is private; check the name, or log in with `hf auth login`"
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"MODEL: {repo_id} cannot be downloaded: {reason}. Check the network, or give a local folder"
        ) from None
    return folder, folder.name


def prepare(request: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Do the stage.

    Args:
        request: `home` (folder), `config` (YAML text), `out` (folder for the files made here).
        events: Takes progress events.

    Returns:
        `model_dir`, `model_commit` (Hub models), `tokens_file` (safetensors with `tokens`, int64, samples x
        length; where sequences differ in length also `lengths`, int64, samples), `samples` made and
        `samples_wanted`, `text_file` and `text_name` of the perplexity text or None.
    """
    home = Home.at(request["home"])
    config = parse_yaml(request["config"]).config
    out = Path(request["out"])
    out.mkdir(parents=True, exist_ok=True)

    events.note(stage="download", message=f"model {config.CUSTOM_MODEL_PATH or config.MODEL}")
    source = resolve_model(config, home)
    commit = None
    model_dir = source.path
    if model_dir is None:
        model_dir, commit = download_model(source.id, home.cache_dir(config) / "hub")

    _check_model(model_dir, config)

    calibration = calibration_source(config, home)
    events.note(stage="download", message=f"calibration text {calibration.label}")
    sequences = token_sequences(
        read_calibration_rows(calibration, home.cache_dir(config) / "datasets"),
        row_encoder(_tokenizer(model_dir), config.CALIBRATION.CHAT_TEMPLATE),
        samples=config.CALIBRATION.SAMPLES,
        length=config.CALIBRATION.SEQUENCE_LENGTH,
        shuffle=config.CALIBRATION.SHUFFLE,
        seed=config.CALIBRATION.SEED,
        packing=config.CALIBRATION.PACKING,
    )
    tokens_file = _save_tokens(sequences, out / "calibration.safetensors")

    text_file = text_name = None
    if config.EVALUATION.ENABLED and config.EVALUATION.PROTOCOLS:
        evaluation = evaluation_source(config)
        events.note(stage="download", message=f"evaluation text {evaluation.label}")
        text_file, text_name = out / "evaluation.jsonl", evaluation.label
        with open(text_file, "w", encoding="utf-8") as file:
            for row in read_rows(evaluation, home.cache_dir(config) / "datasets"):
                file.write(json.dumps({"text": row}) + "\n")
    return {
        "model_dir": str(model_dir),
        "model_commit": commit,
        "tokens_file": str(tokens_file),
        "samples": len(sequences),
        "samples_wanted": config.CALIBRATION.SAMPLES,
        "text_file": str(text_file) if text_file else None,
        "text_name": text_name,
    }


def _check_model(model_dir: Path, config: JobConfig) -> None:
    """Refuse what the engine of the job cannot quantize, before the text is read.

    Raises:
        ModelError: If the model is not supported.
        ConfigErrors: If it does not go with the settings.
        CheckpointError: If its files are broken.
    """
    from backend.engines.configurations import configurations

    planned = configurations(config)
    recipes = [Recipe.from_dict(c.request["recipe"]) for c in planned if c.engine == "native"]
    if recipes:
        from backend.quantize.check import check_model

        check_model(model_dir, recipes)
    for configuration in planned:
        if config.ALGORITHM == "LLMCompressor" and configuration.engine != "native":
            check_llm(model_dir, configuration.request["settings"])


def _tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{model_dir} has no usable tokenizer: {str(error).splitlines()[0]}") from None


def _save_tokens(sequences: list[list[int]], path: Path) -> Path:
    """Sequences of one length as they are; others filled up with zeros beside their `lengths`."""
    import torch
    from safetensors.torch import save_file

    lengths = [len(sequence) for sequence in sequences]
    longest = max(lengths)
    rows = [sequence + [0] * (longest - len(sequence)) for sequence in sequences]
    tensors = {"tokens": torch.tensor(rows, dtype=torch.int64)}  # (samples, length)
    if min(lengths) < longest:
        tensors["lengths"] = torch.tensor(lengths, dtype=torch.int64)  # (samples,)
    save_file(tensors, str(path))
    return path


if __name__ == "__main__":
    run_child(prepare)
