"""The quantize stages of `ALGORITHM: LLMCompressor` with the llm-compressor package.

Run as `python -m backend.engines.llm_compressor REQUEST.json RESULT.json` by a job's runner. The flow is that of the
package's guides (load, calibrate with `oneshot`, save compressed) with our calibration tokens, our checks before and
after, and our events. The package keeps the whole model in memory and cannot continue an interrupted run.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import traceback
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.child import run_child
from backend.engines.clock import Clock
from backend.engines.llm_problems import check_llm
from backend.engines.sequences import read_sequences
from backend.errors import CheckpointError, ConfigError, EngineError, QuantdeckError
from backend.event_stream import EventWriter
from backend.files import give_usual_rights, required, sync_path
from backend.formats.remote_code import remote_code_allowed
from backend.formats.side_files import copy_side_files
from backend.quick_start import quick_import
from backend.schema.llm_tables import NO_SCHEME
from backend.schema.llmcompressor import LLMCompressorSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def quantize(request: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Compress a model folder with the package.

    Args:
        request: `model_dir`, `tokens_file` (safetensors: `tokens`, optional `lengths`), `out_dir`, `seed` and
            `configurations`: one, with `name`, `label` and `settings` (the YAML section).
        events: Takes progress events: one per decoder layer, with its relative output errors where there are any.

    Returns:
        `timings` (per stage: `wall_s`, `cpu_s`), `tokens` used, and `results` with one entry: `layers`, `skipped`
        (Linear: why it was left alone) and `notes`.

    Raises:
        ConfigError: If the settings do not go with the model, or there is more than one configuration.
        EngineError: If the package fails; the message says where.
        CheckpointError: If what it saved holds NaN or infinity.
    """
    clock = Clock()
    source, out = Path(required(request, "model_dir")), Path(required(request, "out_dir"))
    found = required(request, "configurations")
    if len(found) != 1:
        raise ConfigError(
            f"found {len(found)} configurations; llm-compressor makes one per job",
            key="configurations",
            value=len(found),
        )
    name = found[0]["name"]
    settings = LLMCompressorSettings(**found[0]["settings"])
    check_llm(source, settings)
    os.environ.update(ENVIRONMENT)

    events.note(stage="calibrate", message="loading", configuration=name)
    given = read_sequences(Path(required(request, "tokens_file"))) if settings.needs_text else []
    rows = of_one_length(given) if settings.RECIPE == "AutoRound" else given
    remarks = _remarks(settings)
    if len(rows) < len(given):
        remarks.append(
            f"AutoRound needs sequences of one length: {len(given)} sequences were joined and cut into {len(rows)} of "
            f"{len(rows[0])} tokens"
        )
    model = _load(source, settings, int(request.get("seed", 0)))
    timings = {"calibrate": clock.lap()}

    tokens = sum(len(row) for row in rows)
    text = f"{len(rows)} sequences, {tokens} tokens" if rows else "no calibration text is needed"
    events.note(stage="quantize", message=text, configuration=name)
    done = _compress(model, rows, settings, events, name)
    timings["quantize"] = {**clock.lap(), "forward_s": round(done.pop("forward_s"), 3)}

    events.note(stage="save", message="writing the files", configuration=name)
    save(model, source, out / name)
    events.note(stage="save", message="reading them back", configuration=name)
    check_finite(out / name)
    timings["save"] = clock.lap()
    done["notes"] += remarks
    return {"timings": timings, "tokens": tokens, "results": [{"name": name, **done}]}


def of_one_length(rows: list[Tensor]) -> list[Tensor]:
    """Sequences joined and cut to the length of the longest; the rest at the end is left out.

    AutoRound computes all sequences with the positions of the first one, filled up with zeros, so that shorter and
    longer ones together teach it wrong outputs, without a word.
    """
    import torch

    length = max(len(row) for row in rows)
    joined = torch.cat(rows)  # (tokens,)
    return list(joined[: len(joined) // length * length].view(-1, length))


def _load(source: Path, settings: LLMCompressorSettings, seed: int) -> Any:
    quick_import("llmcompressor")
    import numpy
    import torch
    from transformers import AutoModelForCausalLM

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_pretrained(
        source,
        dtype=getattr(torch, settings.dtype),
        local_files_only=True,
        trust_remote_code=remote_code_allowed(),
        use_safetensors=True,
    )


def _compress(
    model: Any, rows: list[Tensor], settings: LLMCompressorSettings, events: EventWriter, name: str
) -> dict[str, Any]:
    """Run the recipe on the model in memory; returns `layers`, `skipped`, `notes` and `forward_s`."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from torch.utils.data import DataLoader

    from backend.engines.llm_progress import Watch
    from backend.engines.llm_recipes import modifiers

    if not torch.accelerator.is_available():
        # AWQ pins its cache for copies to a GPU, and fails where there is none.
        setattr(IntermediatesCache, "pin_memory", lambda *_, **__: None)  # noqa: B010
    recipe = modifiers(settings, model)
    passes = sum(bool(modifier.requires_calibration_data) for modifier in recipe)
    watch = Watch(model, passes, events, name)
    skipped = _skipped(model, settings)
    # Sequences go in one by one, in the order of the file, each with a batch size of 1: nothing is padded or drawn.
    batches: Any = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows]
    no_tokenizer: Any = False  # None would make the package look for one, though the text is tokenized already
    try:
        with watch.following():
            oneshot(
                model=model,
                processor=no_tokenizer,
                recipe=recipe,
                dataset=DataLoader(batches, batch_size=None, shuffle=False) if batches else None,
                num_calibration_samples=max(len(batches), 1),
            )
    except (QuantdeckError, MemoryError):
        raise
    except Exception as error:  # whatever the package raises is its failure; the trace goes to the log
        traceback.print_exc(file=sys.stderr)
        reason = " ".join(str(error).split())[:600] or type(error).__name__
        raise EngineError(f"llm-compressor stopped at {watch.place}: {type(error).__name__}: {reason}") from None
    by = f"made by llm-compressor {version('llmcompressor')}, computed in {settings.dtype}"
    notes = [*dict.fromkeys(watch.notes), by]
    if rows and not watch.layers:
        notes.append(f"llm-compressor measures no error per layer for {settings.RECIPE}")
    return {"layers": watch.layers, "skipped": skipped, "notes": notes, "forward_s": watch.forward_s}


def _skipped(model: nn.Module, settings: LLMCompressorSettings) -> dict[str, str]:
    """Every Linear that stays as it is, and why."""
    from torch import nn

    from backend.engines.llm_recipes import targeted

    if settings.RECIPE == "KVCache":
        return {}
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    chosen = set(targeted(settings, model))
    everything = set(targeted(settings.model_copy(update={"IGNORE": []}), model))
    return {
        name: "listed in IGNORE" if name in everything else "not among TARGETS"
        for name in linears
        if name not in chosen
    }


def _remarks(settings: LLMCompressorSettings) -> list[str]:
    """What somebody who uses the checkpoint should know."""
    notes = []
    if "MASK" in settings.facts.uses:
        size = (
            "the files do not get smaller by them" if settings.SCHEME != NO_SCHEME else "so the files keep their size"
        )
        notes.append(f"zeros are stored like other weights, {size}")
    if settings.SCHEME.startswith(("NVFP4", "MXFP4")):
        notes.append(f"transformers can load this checkpoint in 16 bits ({settings.dtype}), not in float32")
    if settings.RECIPE == "KVCache":
        notes.append("all weights keep their 16 bits; scales for an 8-bit cache were added")
    return notes


def save(model: Any, source: Path, folder: Path) -> None:
    """Write the checkpoint: compressed weights and config.json by the package, the small files from the source.

    The tokenizer, its chat template and the generation settings are copied as they are; saving them through
    transformers would rewrite them in the form of its own version.
    """
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was cut off
    folder.mkdir(parents=True)
    model.save_pretrained(folder, save_compressed=True)
    copy_side_files(source, folder)
    for path in [*folder.rglob("*"), folder]:
        if path.suffix == ".safetensors":
            give_usual_rights(path)
        sync_path(path)


def check_finite(folder: Path) -> None:
    """Read every floating tensor of a checkpoint back.

    Raises:
        CheckpointError: If one holds NaN or infinity; it is named.
    """
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  safe_open is no dict
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not tensor.float().isfinite().all():
                    raise CheckpointError(
                        f"{path.name}: {name} holds NaN or infinity after compression; check the model's own weights, "
                        "or use another recipe, scheme or dtype"
                    )


if __name__ == "__main__":
    run_child(quantize)
