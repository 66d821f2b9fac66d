"""The tensors of an AQLM checkpoint one after the other: where tuning starts from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from backend.errors import CheckpointError, ModelError
from backend.formats import aqlm
from backend.formats.additive_weight import AdditiveWeight
from backend.formats.headers import read_headers
from backend.formats.loader import CheckpointReader
from backend.formats.size import artefact_order
from backend.formats.stored_linears import AqlmLinears, quantization_of, stored_linears
from backend.quantize.aqlm.scheme import AdditiveScheme


def read_scheme(model_dir: Path | str) -> AdditiveScheme:
    """The scheme of an AQLM checkpoint, from its config.json.

    Raises:
        ModelError: If the folder holds another kind of model, or one that cannot be loaded.
    """
    return _linears(Path(model_dir)).scheme


def read_additive(model_dir: Path | str) -> Iterator[tuple[str, AdditiveWeight]]:
    """The quantized Linears of an AQLM checkpoint, layer by layer: name in its files, and what is stored.

    Codebooks and scales have the type in which they are stored; codes are int32 (out, in / G, K). One Linear is held
    in memory at a time.

    Raises:
        ModelError: If the folder holds another kind of model.
        CheckpointError: If files are broken, or a Linear lacks a part.
    """
    folder = Path(model_dir)
    linears = _linears(folder)
    files = {info.name: info.file for info in read_headers(folder)}
    with CheckpointReader(folder, files) as reader:
        for prefix in sorted(_prefixes(files), key=artefact_order):
            lacking = [part for part in aqlm.PARTS if f"{prefix}.{part}" not in files]
            if lacking:
                raise CheckpointError(f"{folder}: {prefix} lacks {', '.join(lacking)}; make the checkpoint again.")
            tensors = {part: reader.take(f"{prefix}.{part}") for part in aqlm.PARTS}
            yield prefix, linears.unpack(prefix, tensors)[0]


def read_unquantized(model_dir: Path | str) -> Iterator[tuple[str, Tensor]]:
    """The other tensors of an AQLM checkpoint, biases of quantized Linears included: name in its files, and values.

    Raises:
        ModelError: If the folder holds another kind of model.
        CheckpointError: If files are broken.
    """
    folder = Path(model_dir)
    _linears(folder)
    files = {info.name: info.file for info in read_headers(folder)}
    prefixes = _prefixes(files)
    rest = [n for n in files if not (n.rpartition(".")[0] in prefixes and n.rpartition(".")[2] in aqlm.PARTS)]
    with CheckpointReader(folder, files) as reader:
        for name in sorted(rest, key=artefact_order):
            yield name, reader.take(name)


def _prefixes(files: Iterable[str]) -> set[str]:
    mark = f".{aqlm.PARTS[0]}"
    return {name.removesuffix(mark) for name in files if name.endswith(mark)}


def _linears(folder: Path) -> AqlmLinears:
    quantization = quantization_of(folder)
    found = stored_linears(folder, quantization) if quantization else None
    if not isinstance(found, AqlmLinears):
        method = quantization["quant_method"] if quantization else "no quantization"
        raise ModelError(f"{folder} holds {method}; an AQLM checkpoint is needed here.")
    return found
