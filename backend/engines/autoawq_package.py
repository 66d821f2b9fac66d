"""The quantize stages of `ALGORITHM: AutoAWQ` with the AutoAWQ package itself (`ENGINE: autoawq`).

Run as `python -m backend.engines.autoawq_package REQUEST.json RESULT.json` by the interpreter of
`environments/autoawq`; imports only what is installed there.

The package gets the job's calibration tokens as they are, and the section's settings after our own checks. What it
saves is put right: it writes `use_cache: false` and `do_sample: true`, and transformers rewrites config.json in the
form of its own version; the source's files are restored, with `quantization_config` added.

The package computes in the type of the model it loads. That is the source's own type, except that float16 on a CPU
is computed in float32: torch's float16 products are about ten times slower there, and bfloat16 would drop bits of
the weights. Scales are float16 in the format; the unquantized tensors are stored in the job's `dtype`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from backend.child import run_child
from backend.engines.autoawq_checks import autoawq_problems
from backend.errors import CheckpointError, ConfigErrors, DataError, EngineError
from backend.event_stream import EventWriter
from backend.files import read_request, required, write_json
from backend.formats.config import read_config_json
from backend.formats.headers import TensorInfo, read_headers
from backend.formats.side_files import copy_side_files, model_config
from backend.formats.side_files import write_json as write_config
from backend.formats.size import is_layer_linear

TOKENS_AT_ONCE = 2**16  # in one forward pass; the package's default settings, 128 x 512, are just this
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float32"}
KEPT = "AutoAWQ quantizes the Linears of the decoder layers alone"

Timings = dict[str, dict[str, float]]


def quantize(request: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Quantize a model folder with the package, once per configuration.

    Args:
        request: `model_dir`, `tokens_file` (safetensors: `tokens`, optional `lengths`), `out_dir`, `device`
            (torch's name), `checkpoint_dir`, `configurations` (each `name`, `label`, `settings`: the YAML section).
        events: Takes progress events: one per decoder layer.

    Returns:
        `timings` per stage, `tokens` used, and `results`, one per configuration. A configuration that an earlier run
        finished is not computed again; the layers of an unfinished one are.

    Raises:
        ConfigErrors: If the package cannot do what is asked.
        DataError: If the calibration text is shorter than one sequence.
        EngineError: If the package fails; the message names the layer.
    """
    source = Path(required(request, "model_dir"))
    clock = _Clock()
    configurations = required(request, "configurations")
    headers, config = read_headers(source), read_config_json(source)
    problems = [p for c in configurations for p in autoawq_problems(headers, c["settings"], config)]
    if problems:
        raise ConfigErrors(problems)
    if request["device"] == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the package takes the best device it sees
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in the model's folder
    rows, length = read_tokens(Path(required(request, "tokens_file")))
    dtype = compute_dtype(headers, request["device"])

    results = []
    for number, configuration in enumerate(configurations):
        done = _Done(request, configuration)
        result = done.read()
        if result is None:
            shutil.rmtree(done.folder, ignore_errors=True)
            run = _Run(source, done.folder, dtype, configuration, events, clock, number, len(configurations))
            result = run.run(rows, length)
            done.write(result)
        results.append(result)
    return {"timings": clock.timings, "tokens": sum(map(len, rows)) // length * length, "results": results}


def compute_dtype(headers: Sequence[TensorInfo], device: str) -> str:
    """Torch's name of the type to load the model in: that of most of its Linears; float32 for float16 on a CPU."""
    found = Counter(t.dtype for t in headers if is_layer_linear(t.name, t.shape))
    dtype = DTYPES[found.most_common(1)[0][0]]
    return "float32" if device == "cpu" and dtype == "float16" else dtype


def read_tokens(path: Path) -> tuple[list[list[int]], int]:
    """The calibration sequences as the package takes them, and the length of its blocks.

    The package joins all sequences and cuts the result into blocks of that length, leaving out the rest at the
    end. Sequences without padding all have that length, so they are used exactly as they are.

    Raises:
        DataError: If they do not fill one block.
    """
    from safetensors.torch import load_file

    stored = load_file(str(path))
    tokens = stored["tokens"]
    length = tokens.shape[1]
    lengths = stored["lengths"].tolist() if "lengths" in stored else [length] * len(tokens)
    rows = [row[:n] for row, n in zip(tokens.tolist(), lengths, strict=True) if n]
    total = sum(map(len, rows))
    if total < length:
        raise DataError(f"the calibration text has {total} tokens; the autoawq package needs {length}, one sequence")
    return rows, length


@dataclass
class _Run:
    """One configuration: load, quantize, save."""

    source: Path
    out: Path
    dtype: str
    configuration: dict[str, Any]
    events: EventWriter
    clock: _Clock
    number: int
    count: int
    place: str = "before the first layer"
    layers: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.name, self.settings = self.configuration["name"], self.configuration["settings"]

    def run(self, rows: Sequence[list[int]], length: int) -> dict[str, Any]:
        self._note("calibrate", f"loading the model in {self.dtype}")
        model = self._load()
        self.clock.lap("calibrate")
        blocks = sum(map(len, rows)) // length
        self._note("quantize", f"{blocks} x {length} tokens")
        self._quantize(model, rows, length, blocks)
        self.clock.lap("quantize")
        self._note("save", "writing the files")
        skipped = self._save(model)
        self.clock.lap("save")
        used = ", ".join(f"{package} {version(package)}" for package in ("autoawq", "torch", "transformers"))
        notes = [f"quantized by {used}; computed in {self.dtype}"]
        if any(len(row) != length for row in rows):
            notes.append(f"the autoawq package joined the sequences and cut them into {blocks} x {length} tokens")
        return {"name": self.name, "layers": self.layers, "skipped": skipped, "notes": notes}

    def _note(self, stage: str, message: str) -> None:
        self.events.note(stage=stage, message=message, configuration=self.name)

    def _load(self) -> Any:
        import torch
        from awq import AutoAWQForCausalLM

        return AutoAWQForCausalLM.from_pretrained(
            str(self.source), torch_dtype=getattr(torch, self.dtype), trust_remote_code=False, safetensors=True
        )

    def _quantize(self, model: Any, rows: Sequence[list[int]], length: int, blocks: int) -> None:
        settings = {
            "w_bit": self.settings["W_BIT"],
            "q_group_size": self.settings["Q_GROUP_SIZE"],
            "zero_point": self.settings["ZERO_POINT"],
            "version": self.settings["VERSION"],
        }
        try:
            model.quantize(
                quant_config=settings,
                calib_data=list(rows),
                max_calib_samples=len(rows),
                max_calib_seq_len=length,
                n_parallel_calib_samples=max(1, TOKENS_AT_ONCE // length) if blocks * length > TOKENS_AT_ONCE else None,
                quantizer_cls=self._watched_quantizer(),
            )
        except Exception as error:
            what = f"{type(error).__name__}: {error}" if str(error) else f"{type(error).__name__} without a message"
            raise EngineError(
                f"the autoawq package stopped in {self.place} ({what}). Weights or activations that are not finite, "
                "or too little memory, are the usual causes; ENGINE: native names the tensor"
            ) from error

    def _watched_quantizer(self) -> type:
        """The package's quantizer, which also says where it is: it visits the layers by these two methods."""
        from awq.quantize.quantizer import AwqQuantizer
        from awq.utils.module import get_op_name

        run = self

        class Watched(AwqQuantizer):
            def _get_input_feat(self, layer: Any, named_linears: Any) -> Any:
                run.place = get_op_name(self.model, layer)
                return super()._get_input_feat(layer, named_linears)

            def _apply_quant(self, module: Any, named_linears: Any) -> None:
                super()._apply_quant(module, named_linears)
                run.layer_done(len(self.modules))

        return Watched

    def layer_done(self, total: int) -> None:
        """Note that a decoder layer is packed. The package measures no error that could be compared with ours."""
        self.layers.append({"layer": self.place, "error": None, "rtn_error": None, "notes": []})
        self.events.note(
            stage="quantize", step=self.number * total + len(self.layers), total=self.count * total,
            layer=self.place, configuration=self.name,
        )  # fmt: skip

    def _save(self, model: Any) -> dict[str, str]:
        """Write the checkpoint folder; returns the Linears that stay in 16 bits."""
        import torch

        dtype = getattr(torch, self.settings["dtype"])
        for name, parameter in model.model.named_parameters():
            stored = parameter.data.to(dtype)
            if not bool(stored.isfinite().all()):
                raise CheckpointError(
                    f"{name} holds values up to {parameter.data.abs().max().item():.4g}, which {dtype} cannot hold; "
                    "set dtype: bfloat16"
                )
            parameter.data = stored
        for name, buffer in model.model.named_buffers():
            if name.endswith((".scales", ".bias")) and not bool(buffer.isfinite().all()):
                raise CheckpointError(f"{name}, made by the autoawq package, has values beyond float16's 65504")
        model.model.cpu()
        linears = {n for n, m in model.model.named_modules() if isinstance(m, torch.nn.Linear)}
        model.save_quantized(str(self.out))
        self._restore()
        return dict.fromkeys(sorted(linears), KEPT)

    def _restore(self) -> None:
        """Put the source's small files in the place of those that the package and transformers wrote."""
        saved = json.loads((self.out / "config.json").read_text(encoding="utf-8"))
        config = model_config(self.source, self.settings["dtype"], saved["quantization_config"])
        (self.out / "generation_config.json").unlink(missing_ok=True)
        copy_side_files(self.source, self.out)
        write_config(self.out / "config.json", config)
        for path in self.out.glob("*.safetensors"):  # written for their owner's eyes only
            shutil.copymode(self.out / "config.json", path)


class _Done:
    """The note that a configuration is finished, kept with what was asked, for a job that is resumed."""

    def __init__(self, request: dict[str, Any], configuration: dict[str, Any]) -> None:
        folder = request.get("checkpoint_dir")
        self.path = Path(folder) / f"{configuration['name']}.json" if folder else None
        self.asked = [request["model_dir"], request["tokens_file"], request["device"], configuration]
        self.folder = Path(request["out_dir"]) / configuration["name"]

    def read(self) -> dict[str, Any] | None:
        if self.path is None or not self.path.exists() or not (self.folder / "config.json").exists():
            return None
        note = read_request(self.path)
        return note["result"] if note["asked"] == self.asked else None

    def write(self, result: dict[str, Any]) -> None:
        if self.path is not None:
            write_json(self.path, {"asked": self.asked, "result": result})


class _Clock:
    """Adds up wall and CPU seconds per stage; the first lap counts from the process's own start."""

    def __init__(self) -> None:
        self.timings: Timings = {}
        self._wall, self._cpu = time.perf_counter(), 0.0

    def lap(self, stage: str) -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        spent = self.timings.setdefault(stage, {"wall_s": 0.0, "cpu_s": 0.0})
        spent["wall_s"] = round(spent["wall_s"] + wall - self._wall, 3)
        spent["cpu_s"] = round(spent["cpu_s"] + cpu - self._cpu, 3)
        self._wall, self._cpu = wall, cpu


if __name__ == "__main__":
    run_child(quantize)
