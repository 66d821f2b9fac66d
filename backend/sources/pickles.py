"""Weights that are stored as pickle, made into safetensors before anything else sees them.

Only where the operator allows it (`[models] allow_pickle` in quantdeck.toml). The files are opened in a process of
its own, without our environment variables, by the unpickler of torch that builds tensors and nothing else. It has
had holes; whoever allows it trusts the origin of the files.

Run as `python -m backend.sources.pickles REQUEST.json RESULT.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from backend.child import run_child
from backend.errors import CheckpointError
from backend.event_stream import EventWriter
from backend.files import sync_path, write_json
from backend.formats.config import read_config_json
from backend.formats.headers import INDEX_FILE, MAX_INDEX_BYTES, PICKLE_SUFFIXES, SINGLE_FILE
from backend.formats.regular import read_regular
from backend.formats.remote_code import VARIABLE as REMOTE_CODE
from backend.formats.side_files import copy_side_files
from backend.paths import PROJECT
from backend.process import PARENT_VARIABLE

PICKLE_INDEX = "pytorch_model.bin.index.json"
DOWNLOADED = ["pytorch_model*.bin", PICKLE_INDEX]
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
NOT_WEIGHTS = ("training_args", "optimizer", "scheduler", "rng_state", "scaler", "random_states")
FIRST_SAFE_TORCH = (2, 10)
PASSED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "OMP_NUM_THREADS", PARENT_VARIABLE, REMOTE_CODE)


def convert(folder: Path, out: Path, work: Path) -> Path:
    """Make a model folder with safetensors of one whose weights are pickles.

    Args:
        folder: The model; its JSON files are checked first.
        out: Folder to make; what is there is replaced.
        work: Where the request and result of the process go.

    Returns:
        `out`.

    Raises:
        ModelError: If config.json is missing, broken or asks for code.
        CheckpointError: If a file holds anything but tensors, or is broken.
    """
    read_config_json(folder)
    shutil.rmtree(out, ignore_errors=True)
    request, result = work / "pickles.request.json", work / "pickles.json"
    result.unlink(missing_ok=True)
    write_json(request, {"folder": str(folder), "out": str(out)})
    environment = {key: os.environ[key] for key in PASSED if key in os.environ}
    environment |= {PARENT_VARIABLE: str(os.getpid()), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "backend.sources.pickles", str(request), str(result)],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=PROJECT, env=environment,
    )  # fmt: skip
    if done.returncode != 0:
        raise CheckpointError(_reason(done.stdout, folder, done.returncode))
    return out


def _reason(output: bytes, folder: Path, code: int) -> str:
    """What the process said about its failure."""
    for line in reversed(output.decode("utf-8", "replace").splitlines()):
        event = json.loads(line)
        if event.get("stage") == "error":
            return str(event["message"])
    return f"The pickle files of {folder} could not be converted: the process ended with code {code}, see the log."


def unpickle(request: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Do the conversion, in a process of its own.

    Args:
        request: `folder` and `out`.
        events: Takes one progress event per file.
    """
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < FIRST_SAFE_TORCH:
        raise CheckpointError(f"torch {torch.__version__} opens pickle files unsafely; 2.10 or later is needed")
    folder, out = Path(request["folder"]), Path(request["out"])
    files = torch_files(folder)
    out.mkdir(parents=True)
    places: dict[str, str] = {}
    for number, name in enumerate(files, 1):
        events.progress("download", number, len(files), f"converting {name}")
        target = SINGLE_FILE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        for tensor in _convert_file(folder / name, out / target):
            if tensor in places:
                raise CheckpointError(f"{folder}: tensor {tensor!r} is stored twice, the second time in {name}")
            places[tensor] = target
    if len(files) > 1:
        write_json(out / INDEX_FILE, {"metadata": {}, "weight_map": places})
    shutil.copyfile(folder / "config.json", out / "config.json")
    copy_side_files(folder, out)
    for path in out.iterdir():
        sync_path(path)
    return {"files": sorted(set(places.values()))}


def torch_files(folder: Path) -> list[str]:
    """Names of the pickle files that make up a checkpoint.

    Raises:
        CheckpointError: If there are none, several without an index, or the index names what is not there.
    """
    if (folder / PICKLE_INDEX).is_file():
        try:
            weight_map = json.loads(read_regular(folder / PICKLE_INDEX, MAX_INDEX_BYTES).decode("utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{folder / PICKLE_INDEX} is not a shard index ({error})") from None
        for name in names:
            inside = isinstance(name, str) and Path(name).name == name and name.endswith(TORCH_SUFFIXES)
            if not inside or not (folder / name).is_file():
                raise CheckpointError(f"{folder / PICKLE_INDEX} names {name!r}, which is no file of that folder")
        return names
    if (folder / "pytorch_model.bin").is_file():
        return ["pytorch_model.bin"]
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix.lower() in TORCH_SUFFIXES and path.is_file() and not path.name.startswith(NOT_WEIGHTS)
    )
    if len(names) != 1:
        others = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in PICKLE_SUFFIXES)
        raise CheckpointError(
            f"{folder} must hold pytorch_model.bin, or {PICKLE_INDEX} with its shards; found {', '.join(others[:5])}"
        )
    return names


def _convert_file(path: Path, target: Path) -> list[str]:
    """One file; returns the names of its tensors."""
    import torch
    from safetensors.torch import save_file

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the file makes it raise
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise CheckpointError(
            f"{path} is refused: it is broken, or holds more than tensors ({reason}). Get the model as safetensors"
        ) from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path} holds {type(content).__name__}; a table of tensors is expected")
    tensors: dict[str, torch.Tensor] = {}
    room = 2 * path.stat().st_size  # tied weights may be there twice, nothing more often
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(f"{path}: {str(name)[:100]!r} is no plain tensor")
        n_bytes = tensor.numel() * tensor.element_size()
        room -= n_bytes
        if n_bytes > tensor.untyped_storage().nbytes() or room < 0:
            raise CheckpointError(f"{path}: {name[:100]!r} claims more data than the file holds")
        tensors[name] = tensor.detach().contiguous().clone()
    try:
        save_file(tensors, str(target), metadata={"format": "pt"})
    except (KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} holds tensors that safetensors cannot store: {error}") from None
    return list(tensors)


if __name__ == "__main__":
    run_child(unpickle)
