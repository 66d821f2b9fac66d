"""An AQLM checkpoint through the eyes of others: loaded by transformers with the aqlm package, and compared with ours.

The other program runs in a process of its own with one numba thread (with more, aqlm's CPU kernel gives wrong numbers)
in float32 (the only type that it takes), and saves nothing: its first forward pass permutes the codes in place.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backend.errors import CheckpointError, EngineError, ModelError, QuantdeckError
from backend.formats.additive_reader import read_additive
from backend.formats.remote_code import remote_code_allowed
from backend.paths import PROJECT
from backend.process import PARENT_VARIABLE, die_with_starter
from backend.quick_start import quick_import

SAMPLES, LENGTH, SEED = 2, 24, 0
TOLERANCE = 1e-3
"""Largest difference of two logits, as a part of the standard deviation of all of them. Both sides compute with the
same weights in float32, in another order: a 22-layer model differs by some 1e-5. A wrong code or scale gives 1e-1."""
ONE_THREAD = {"NUMBA_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Reload:
    """What the other program made of a checkpoint.

    Attributes:
        linears: Linears that it loaded quantized.
        difference: Largest difference of its logits from ours, as a part of the standard deviation of ours.
        tolerance: What is allowed.
    """

    linears: int
    difference: float
    tolerance: float = TOLERANCE


def check_reload(model_dir: Path | str) -> Reload:
    """Load an AQLM folder with transformers and aqlm, and compare with what we read from the same files.

    Compared are which Linears are quantized, each of their dequantised weights (equal to the last bit), and the logits
    of random tokens.

    Raises:
        CheckpointError: If they differ; the message says in what.
        EngineError: If a package is missing, or the other program failed otherwise.
    """
    folder = Path(model_dir).resolve()
    for package in ("aqlm", "accelerate"):
        if find_spec(package) is None:
            raise EngineError(f"{folder} cannot be checked: {package} is not installed. Run pip install 'aqlm[cpu]'.")
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.run(
            [sys.executable, "-m", __name__, str(folder)],
            stdout=subprocess.PIPE,
            stderr=said,
            env={**os.environ, **ONE_THREAD, PARENT_VARIABLE: str(os.getpid())},
            cwd=PROJECT,
            text=True,
            check=False,
        )
        said.seek(0)
        log = said.read()
    try:
        answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (log.strip().splitlines() or ["it said nothing"])[-1]
        raise EngineError(
            f"{folder} could not be loaded with transformers and aqlm (exit code {child.returncode}): {last[:500]}"
        ) from None
    if "error" in answer:
        raise (CheckpointError if answer["differs"] else EngineError)(answer["error"])
    return Reload(**answer)


def compare(folder: Path) -> Reload:
    """The comparison itself, to be run in a process of its own.

    Raises:
        CheckpointError: If something differs.
        ModelError: If the folder cannot be loaded here.
    """
    quick_import("transformers.models.auto.modeling_auto", "aqlm", "backend.formats.loader")
    peer = _peers_model(folder)
    names = _check_linears(folder, peer)
    _check_weights(folder, peer, names)
    ids = _tokens(peer.config.get_text_config())
    theirs = _logits(peer, ids)
    del peer
    gc.collect()
    from backend.formats.loader import load_model

    ours = _logits(load_model(folder, dtype=torch.float32, packed_codes=True), ids)
    return Reload(len(names), _difference(folder, theirs, ours))


def _peers_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=remote_code_allowed(),
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ImportError, ValueError, TypeError, KeyError, AttributeError, OSError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(f"{folder} does not load with transformers and aqlm: {' '.join(lines[:3])}") from error
    model, info = loaded
    for key, what in (("missing_keys", "lacks"), ("unexpected_keys", "has too many"), ("mismatched_keys", "misfits")):
        if found := sorted(map(str, info.get(key) or ())):
            raise CheckpointError(
                f"{folder}: transformers with aqlm says that it {what} {len(found)} tensors, first {found[0]}."
            )
    return model.eval()


def _check_linears(folder: Path, peer: nn.Module) -> dict[str, str]:
    """The quantized Linears, module -> name in the files; refused unless both sides mean the same ones."""
    from aqlm import QuantizedLinear

    from backend.formats.headers import read_headers
    from backend.formats.skeleton import build_skeleton, match_tensors, read_config

    prefixes = [t.name.removesuffix(".codes") for t in read_headers(folder) if t.name.endswith(".codes")]
    places = match_tensors(build_skeleton(read_config(folder), torch.bfloat16), [f"{p}.weight" for p in prefixes])
    ours = {n.removesuffix(".weight"): stored.removesuffix(".weight") for n, stored in places.stored.items()}
    theirs = {name for name, module in peer.named_modules() if isinstance(module, QuantizedLinear)}
    for names, what in ((theirs - ours.keys(), "takes {} for quantized, and no file has codes of it"),
                        (ours.keys() - theirs, "leaves {} unquantized, and the files have its codes")):  # fmt: skip
        if names:
            raise CheckpointError(f"{folder}: transformers with aqlm {what.format(min(names))} ({len(names)} in all).")
    return ours


def _check_weights(folder: Path, peer: nn.Module, names: dict[str, str]) -> None:
    from aqlm.utils import _dequantize_weight, unpack_int_data

    modules = {stored: peer.get_submodule(name) for name, stored in names.items()}
    for prefix, weight in read_additive(folder):
        module: Any = modules[prefix]
        codes = unpack_int_data(module.codes.data, module.nbits_per_codebook)
        with torch.no_grad():
            theirs = _dequantize_weight(codes, module.codebooks, module.scales)
        ours = weight.dequantize()
        if not torch.equal(theirs, ours):
            worst = float((theirs - ours).abs().max())
            raise CheckpointError(
                f"{folder}: the weight of {prefix} differs from what aqlm reads by up to {worst:.3g} (its largest "
                f"is {float(ours.abs().max()):.3g})."
            )


def _tokens(config: Any) -> Tensor:
    length = min(LENGTH, getattr(config, "max_position_embeddings", None) or LENGTH)
    return torch.randint(0, config.vocab_size, (SAMPLES, length), generator=torch.Generator().manual_seed(SEED))


def _difference(folder: Path, theirs: Tensor, ours: Tensor) -> float:
    """The largest difference of logits in standard deviations of ours; refused beyond the tolerance."""
    difference = float((theirs - ours).abs().max() / ours.std())
    if not difference <= TOLERANCE:  # a NaN is no agreement
        raise CheckpointError(
            f"{folder}: with transformers and aqlm the logits differ from those of the dequantised model by up to "
            f"{difference:.2g} of their standard deviation; allowed is {TOLERANCE:g}. All quantized weights are equal, "
            "so it is another tensor or the kernel."
        )
    return difference


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(input_ids=ids, use_cache=False).logits.float()
    return found


def main() -> int:
    """Print what came out as one line of JSON."""
    die_with_starter()
    try:
        answer = asdict(compare(Path(sys.argv[1])))
    except ModuleNotFoundError as error:
        answer = {"error": f"The check with transformers and aqlm needs {error.name}; install it.", "differs": False}
    except QuantdeckError as error:
        answer = {"error": error.message, "differs": isinstance(error, CheckpointError | ModelError)}
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
