"""The `download` stage: everything from outside is fetched and checked before hours of work begin.

Run as `python -m backend.sources.prepare REQUEST.json RESULT.json` by a job's runner. It resolves the model
(downloading only safetensors, configuration and tokenizer files), reads and tokenizes the calibration text,
and writes the evaluation text to a file, so that later stages need no network.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from pathlib import Path
from typing import Any

from backend.child import run_child
from backend.engines.llm_problems import check_llm
from backend.errors import CheckpointError, ModelError
from backend.event_stream import EventWriter
from backend.files import sha256_file
from backend.formats.config import read_config_json
from backend.formats.headers import has_only_pickles, read_headers
from backend.formats.remote_code import remote_code_allowed
from backend.paths import Home
from backend.quick_start import quick_import
from backend.schema import AQLMSettings, JobConfig, TensorRTLLMSettings, parse_yaml
from backend.settings import Settings
from backend.sources.calibration import token_sequences
from backend.sources.hub_errors import HubUnreachable, hub_error
from backend.sources.messages import row_encoder
from backend.sources.models import WANTED_FILES, resolve_model
from backend.sources.pickles import DOWNLOADED, convert
from backend.sources.places import check_outputs
from backend.sources.plan import calibration_source, evaluation_source, tuning_source
from backend.sources.quick_check import quick_check
from backend.sources.texts import read_calibration_rows, read_rows
from backend.sources.tuning import check_block_type, held_out, tuning_sequences

BUSY_WAITS_S = (1.0, 4.0, 15.0)
"""How long to wait before the next try when the Hub answers that it is busy or ill."""


def download_model(
    repo_id: str, cache_dir: Path, revision: str | None = None, *, allow_pickle: bool = False
) -> tuple[Path, str]:
    """Fetch a model from the Hub, without pickles, and without code unless this process may run it.

    Args:
        repo_id: Its name.
        cache_dir: Where downloads are kept.
        revision: Branch, tag or commit; None for the newest of the main branch.
        allow_pickle: Fetch the pickle files of a model that has no others.

    Returns:
        The snapshot folder and its commit.

    Where the Hub cannot be reached, a model is taken from the cache as it is; from the one of huggingface_hub, which
    other programs fill, if ours does not have it.

    Raises:
        ModelError: If it does not exist, is gated, or the network is down; the message says which.
        CheckpointError: If a file arrives broken twice.
    """
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    def snapshot(patterns: list[str], revision: str | None = revision) -> Path:
        for wait_s in (*BUSY_WAITS_S, None):
            try:
                found = snapshot_download(repo_id, revision=revision, cache_dir=cache_dir, allow_patterns=patterns)
            except HfHubHTTPError as error:
                status = error.response.status_code if error.response is not None else 0
                if wait_s is None or not (status == 429 or status >= 500):
                    raise
                time.sleep(wait_s)
            else:
                return Path(found)
        raise AssertionError("the last turn returns or raises")

    def fetch() -> Path:
        folder = snapshot([*WANTED_FILES, "*.py"] if remote_code_allowed() else WANTED_FILES)
        if allow_pickle and not any(folder.glob("*.safetensors")):
            snapshot(DOWNLOADED, folder.name)
        return folder

    try:
        folder = fetch()
        if broken := _broken_files(folder):
            for path in broken:
                path.resolve().unlink()
                path.unlink()
            folder = fetch()
            if broken := _broken_files(folder):
                raise CheckpointError(
                    f"MODEL: {broken[0].name} of {repo_id} was downloaded twice and each time is not what the Hub says "
                    "it is (its checksum differs); check the network or the mirror, then start the job again"
                )
    except (HfHubHTTPError, httpx.HTTPError, OSError, ValueError) as error:
        told = hub_error(error, repo_id, revision)
        if isinstance(told, HubUnreachable) and (kept := _kept_elsewhere(repo_id, revision)) is not None:
            return kept, kept.name
        raise told from None
    return folder, folder.name


def _kept_elsewhere(repo_id: str, revision: str | None) -> Path | None:
    """A whole copy of a model in the cache that huggingface_hub keeps for all programs of this user, only read."""
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(
            snapshot_download(repo_id, revision=revision, cache_dir=constants.HF_HUB_CACHE, local_files_only=True)
        )
        read_headers(folder)
    except (LocalEntryNotFoundError, CheckpointError, OSError):
        return None
    return folder if (folder / "config.json").is_file() and not _broken_files(folder) else None


def _broken_files(folder: Path) -> list[Path]:
    """Files of a snapshot that are not what their checksum says: cut or changed on the way, or on the disk since.

    The Hub's cache names each file by its checksum: SHA-256 for large files, git's SHA-1 for the others.
    """
    broken = []
    for path in sorted(folder.rglob("*")):
        blob = path.resolve()
        if not path.is_symlink() or not blob.is_file() or not re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
            continue
        if len(blob.name) == 64:
            found = sha256_file(blob)
        else:
            content = blob.read_bytes()
            found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        if found != blob.name:
            broken.append(path)
    return broken


def prepare(request: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Do the stage.

    Args:
        request: `home` (folder), `config` (YAML text), `out` (folder for the files made here), `device` (of the job).
        events: Takes progress events.

    Returns:
        `model_dir`, `model_commit` (Hub models), `tokens_file` (safetensors with `tokens`, int64, samples x
        length; where sequences differ in length also `lengths`, int64, samples), `samples` made and
        `samples_wanted`, `text_file` and `text_name` of the perplexity text or None; of a job that tunes the whole
        model also `tuning_file` (safetensors with `train` and `validation`, int64, sequences x length).
    """
    home = Home.at(request["home"])
    config = parse_yaml(request["config"]).config
    check_outputs(config, home)
    allow_pickle = Settings.load(home).models.allow_pickle
    out = Path(request["out"])
    out.mkdir(parents=True, exist_ok=True)

    events.note(stage="download", message=f"model {config.CUSTOM_MODEL_PATH or config.MODEL}")
    source = resolve_model(config, home)
    commit = None
    model_dir = source.path
    if model_dir is None:
        model_dir, commit = download_model(
            source.id, home.cache_dir(config) / "hub", config.REVISION, allow_pickle=allow_pickle
        )
    if allow_pickle and has_only_pickles(model_dir):
        events.note(stage="download", message="the weights are stored as pickle: converting them to safetensors")
        model_dir = convert(model_dir, out / "model", out)

    _check_model(model_dir, config, request.get("device", "cpu"))

    calibration = calibration_source(config, home)
    events.note(stage="download", message=f"calibration text {calibration.label}")
    cache = home.cache_dir(config) / "datasets"
    encode = row_encoder(_tokenizer(model_dir), config.calibration.CHAT_TEMPLATE)
    sequences = token_sequences(
        read_calibration_rows(calibration, cache),
        encode,
        samples=config.calibration.SAMPLES,
        length=config.calibration.SEQUENCE_LENGTH,
        shuffle=config.calibration.SHUFFLE,
        seed=config.calibration.SEED,
        packing=config.calibration.PACKING,
    )
    config.check_sequences(len(sequences))
    tokens_file = _save_tokens(sequences, out / "calibration.safetensors")
    made: dict[str, Any] = {}
    tuning = tuning_source(config, home)
    if tuning is not None:
        events.note(stage="download", message=f"tuning text {tuning.label}")
        rows = tuning_sequences(config, read_calibration_rows(tuning, cache), encode)
        made["tuning_file"] = str(_save_split(rows, held_out(config, len(rows)), out / "tuning.safetensors"))

    text_file = text_name = None
    if config.EVALUATION.needs_text:
        evaluation = evaluation_source(config)
        events.note(stage="download", message=f"evaluation text {evaluation.label}")
        text_file, text_name = out / "evaluation.jsonl", evaluation.label
        with open(text_file, "w", encoding="utf-8") as file:
            for row in read_rows(evaluation, cache):
                file.write(json.dumps({"text": row}) + "\n")
    return {
        "model_dir": str(model_dir),
        "model_commit": commit,
        "tokens_file": str(tokens_file),
        "samples": len(sequences),
        "samples_wanted": config.calibration.SAMPLES,
        "text_file": str(text_file) if text_file else None,
        "text_name": text_name,
        **made,
    }


def _check_model(model_dir: Path, config: JobConfig, device: str) -> None:
    """Refuse what the engine of the job cannot quantize, before the text is read.

    Raises:
        ModelError: If the model is not supported.
        ConfigErrors: If it does not go with the settings.
        CheckpointError: If its files are broken.
    """
    quick_import("torch", "transformers.models.auto.tokenization_auto")
    from backend.engines.configurations import configurations

    planned = configurations(config, device)
    if recipes := [recipe for one in planned if (recipe := one.recipe) is not None]:
        from backend.quantize.check import check_model

        check_model(model_dir, recipes)
    for configuration in planned:
        if (scheme := configuration.additive) is not None:
            from backend.quantize.aqlm.plan import check_model as check_additive

            check_additive(model_dir, scheme)
        if config.ALGORITHM == "LLMCompressor" and configuration.engine != "native":
            check_llm(model_dir, configuration.request["settings"])
    if isinstance(config.algorithm_settings, TensorRTLLMSettings):
        from backend.tensorrt_llm.fit import check_fit

        check_fit(quick_check(model_dir, remote_code=remote_code_allowed()), config)
    if isinstance(config.algorithm_settings, AQLMSettings) and config.algorithm_settings.tunes:
        check_block_type(model_dir, config.algorithm_settings.finetune_config.block_type)


def _tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    read_config_json(model_dir)  # refuses files that ask for code
    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=remote_code_allowed())
    except Exception as error:  # the tokenizers package raises plain Exception for a broken file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{model_dir} has no usable tokenizer: {reason}") from None


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


def _save_split(sequences: list[list[int]], held: int, path: Path) -> Path:
    """Sequences of one length, the last `held` of them apart."""
    import torch
    from safetensors.torch import save_file

    tokens = torch.tensor(sequences, dtype=torch.int64)
    save_file({"train": tokens[:-held].clone(), "validation": tokens[-held:].clone()}, str(path))
    return path


if __name__ == "__main__":
    run_child(prepare)
