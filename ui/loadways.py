"""Who can load a quantized model: for each program the command for this very folder, or why it cannot read it.

What a folder holds is read from its config.json. What is said of programs that do not run here (vLLM, TensorRT-LLM,
gptqmodel) is from their documentation and source.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from backend.demo import TASK_DIR, TASK_NAME
from backend.engines.trtllm_handover import SCRIPT
from backend.errors import QuantdeckError
from backend.formats.compressed_config import METHOD as COMPRESSED
from backend.formats.compressed_config import PACK_QUANTIZED
from backend.formats.modelopt_layout import METHOD as MODELOPT
from backend.formats.modelopt_layout import TOGETHER
from backend.schema import parse_yaml
from backend.sources.plan import evaluation_tasks
from backend.tensorrt_llm.methods import METHODS, PYTORCH

Stated = Mapping[str, Any]
GUIDES_TASK = (("arc_challenge", 25, None),)
KERNEL_BITS = {4, 8}
PROMPT = "The capital of France is"
UNTRIED = "Not tried on this machine"
BF16_FORMATS = ("nvfp4-pack-quantized", "mxfp4-pack-quantized")
VLLM_MODELOPT = ("FP8", "NVFP4")

Task = tuple[str, int, int | None]
"""Name, shots, limit."""


@dataclass(frozen=True)
class Way:
    """One program and this folder.

    Attributes:
        program: Its name.
        command: What to type, or run with Python; empty if the program cannot load the folder.
        remark: What that needs, or why it cannot.
    """

    program: str
    command: str
    remark: str


@lru_cache(maxsize=64)
def tasks_of(config_yaml: str) -> tuple[Task, ...]:
    """The lm-eval tasks that a job measures; the guide's if it measures none."""
    try:
        found = evaluation_tasks(parse_yaml(config_yaml).config)
    except QuantdeckError:  # a file of an older version
        found = []
    return tuple((task.NAME, task.NUM_FEWSHOT, task.LIMIT) for task in found) or GUIDES_TASK


def ways(folder: Path, stated: Stated, tasks: Sequence[Task] = GUIDES_TASK) -> list[Way]:
    """How each program loads a folder.

    Args:
        folder: The model, absolute.
        stated: The `quantization_config` of its config.json; empty for weights that are not packed.
        tasks: What lm_eval is to measure.
    """
    method = method_of(stated)
    ways_of = {"awq": _autoawq, COMPRESSED: _compressed, "aqlm": _aqlm, MODELOPT: _modelopt}.get(method, _plain)
    return [_ours(folder), *ways_of(folder, stated, tasks)]


def method_of(stated: Stated) -> str:
    """The `quant_method`, also of files that do not name it; empty for weights that are not packed."""
    named = "awq" if "bits" in stated else COMPRESSED if "config_groups" in stated else ""
    return str(stated.get("quant_method") or named)


def weight_bits(stated: Stated) -> set[int]:
    """The bits of the quantized weights, as a checkpoint states them; empty if it states none."""
    try:
        found = [stated.get("bits"), *(weights.get("num_bits") for weights in _weights(stated))]
        return {int(bits) for bits in found if bits}
    except (ValueError, TypeError):  # not as one of ours
        return set()


def _groups(stated: Stated) -> list[Mapping[str, Any]]:
    groups = stated.get("config_groups")
    return [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []


def _weights(stated: Stated) -> list[Mapping[str, Any]]:
    return [weights for group in _groups(stated) if isinstance(weights := group.get("weights"), Mapping)]


def _ours(folder: Path) -> Way:
    where = repr(str(folder))
    code = (
        "from backend.formats.loader import load_model, load_tokenizer\n\n"
        f"model = load_model({where})\ntokenizer = load_tokenizer({where})\n{_answer()}"
    )
    return Way(
        "Python (Quantdeck)", code, "With Quantdeck's Python, in its folder. Weights stay packed where they can."
    )


def _answer(device: str = "") -> str:
    return (
        f'inputs = tokenizer("{PROMPT}", return_tensors="pt"){device}\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"
    )


def _transformers(folder: Path, remark: str, *, dtype: str = '"auto"', before: str = "") -> Way:
    where = repr(str(folder))
    code = (
        f"{before}from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"tokenizer = AutoTokenizer.from_pretrained({where})\n"
        f'model = AutoModelForCausalLM.from_pretrained({where}, dtype={dtype}, device_map="auto")\n'
        f"{_answer('.to(model.device)')}"
    )
    return Way("transformers", code, remark)


def _lm_eval(folder: Path, tasks: Sequence[Task], remark: str, *, dtype: str = "", before: str = "") -> Way:
    model = shlex.quote(f"pretrained={_lm_eval_value(str(folder))}{dtype}")
    lines = []
    for name, shots, limit in tasks:
        own = f" --include_path {shlex.quote(str(TASK_DIR))}" if name == TASK_NAME else ""
        line = f"{before}lm_eval --model hf --model_args {model}{own} --tasks {shlex.quote(name)} --num_fewshot {shots}"
        lines.append(line + (f" --limit {limit}" if limit else ""))
    return Way("lm_eval", "\n".join(lines), remark)


def _lm_eval_value(text: str) -> str:
    """A text as lm_eval reads it: it splits at commas outside of quotes, and takes what is in quotes for Python's."""
    if not set(text) & set(",\"'[](){}\\"):
        return text
    inside = text.replace("\\", "\\\\").replace('"', "\\x22")
    return f'"{inside}"'


def _vllm(folder: Path, remark: str) -> Way:
    return Way("vLLM", f"vllm serve {shlex.quote(str(folder))}", f"{remark} {UNTRIED}.")


def _no_engine() -> Way:
    why = "It reads what nvidia-modelopt exports: make a job with ALGORITHM: TensorRTLLM of the same model."
    return Way("TensorRT-LLM", "", why)


def _plain(folder: Path, stated: Stated, tasks: Sequence[Task]) -> Iterator[Way]:
    yield _transformers(folder, "The weights are stored dense, as of any model.")
    yield _vllm(folder, "A GPU.")
    yield _lm_eval(folder, tasks, "`pip install lm_eval[hf]`.")
    serve = f"trtllm-serve {shlex.quote(str(folder))}"
    yield Way("TensorRT-LLM", serve, f"A GPU, and an architecture that it knows. {UNTRIED}.")


def _autoawq(folder: Path, stated: Stated, tasks: Sequence[Task]) -> Iterator[Way]:
    gemv = str(stated.get("version", "gemm")).lower() != "gemm"
    needs = "`pip install gptqmodel` in an environment of its own: transformers gives AutoAWQ's files to that package"
    yield _transformers(folder, f"{needs}. {UNTRIED}.", dtype='"float16"')
    if gemv:
        yield Way(
            "vLLM", "", "It reads AutoAWQ's GEMM layout only, this is GEMV: make the job again with VERSION: GEMM."
        )
    else:
        yield _vllm(folder, "A GPU of compute capability 7.5 or newer.")
    yield _lm_eval(folder, tasks, f"{needs}, and so does lm_eval. {UNTRIED}.", dtype=",dtype=float16")
    yield _no_engine()


def _compressed(folder: Path, stated: Stated, tasks: Sequence[Task]) -> Iterator[Way]:
    bf16 = _format(stated) in BF16_FORMATS
    needs = "`pip install transformers compressed-tensors accelerate`"
    told = "It unpacks the weights to 16 bits as it starts, so memory and speed are those of a 16-bit model."
    yield _transformers(folder, f"{needs}. {told}", dtype='"bfloat16"' if bf16 else '"auto"')
    why = _not_in_vllm(stated)
    yield Way("vLLM", "", why) if why else _vllm(folder, "A GPU that has kernels for this format.")
    dtype = ",dtype=bfloat16" if bf16 else ""
    yield _lm_eval(folder, tasks, "`pip install lm_eval[hf] compressed-tensors accelerate`.", dtype=dtype)
    yield _no_engine()


def _format(stated: Stated) -> str:
    return str(stated.get("format") or PACK_QUANTIZED)


def _not_in_vllm(stated: Stated) -> str:
    """Why vLLM does not run packed weights; empty if it does."""
    if _format(stated) != PACK_QUANTIZED:
        return ""
    bits = weight_bits(stated)
    if other := sorted(bits - KERNEL_BITS):
        shown = " and ".join(map(str, other))
        return (
            f"vLLM's usual kernels take packed weights of 4 and 8 bits, these have {shown}. Its newest versions have "
            f"kernels for other widths on some GPUs. {UNTRIED}."
        )
    if any(weights.get("num_bits") == 8 and weights.get("symmetric") is False for weights in _weights(stated)):
        return (
            "vLLM's usual kernels take 8-bit weights without zero points only: make the job again with SYMMETRIC: "
            f"True. {UNTRIED}."
        )
    if apart := _fused_apart(stated):
        return f"vLLM joins {apart} of a layer, so they must be quantized alike; here they are not in every layer."
    return ""


def _fused_apart(stated: Stated) -> str:
    """Linears that vLLM joins into one, and that differ in bits or groups; empty if there are none."""
    schemes = {name: number for number, group in enumerate(_groups(stated)) for name in _names(group.get("targets"))}
    everywhere = schemes.get("Linear")
    schemes |= {name: -1 for name in _names(stated.get("ignore"))}
    for family in TOGETHER:
        parents = {name.rpartition(".")[0] for name in schemes if name.rpartition(".")[2] in family}
        for parent in parents:
            if len({schemes.get(f"{parent}.{name}", everywhere) for name in family}) > 1:
                return ", ".join(family)
    return ""


def _names(value: Any) -> list[str]:
    return list(map(str, value)) if isinstance(value, list) else []


def _aqlm(folder: Path, stated: Stated, tasks: Sequence[Task]) -> Iterator[Way]:
    needs = (
        "`pip install transformers accelerate aqlm[gpu]`, or `aqlm[cpu]`. On a CPU with one thread of numba and in "
        "float32: with more threads its kernel gives wrong results"
    )
    before = 'import os\n\nos.environ["NUMBA_NUM_THREADS"] = "1"\nimport torch\n'
    dtype = "torch.float16 if torch.cuda.is_available() else torch.float32"
    yield _transformers(folder, f"{needs}.", dtype=dtype, before=before)
    yield Way("vLLM", "", "Its recent versions no longer read AQLM.")
    remark = f"{needs}; on a GPU leave out `dtype`."
    yield _lm_eval(folder, tasks, remark, dtype=",dtype=float32", before="NUMBA_NUM_THREADS=1 ")
    yield _no_engine()


def _modelopt(folder: Path, stated: Stated, tasks: Sequence[Task]) -> Iterator[Way]:
    algorithm = str(stated.get("quant_algo") or "")
    nonsense = "It takes the codes for weights without a word, and answers nonsense"
    yield Way("transformers", "", f"{nonsense}: it does not know modelopt's files.")
    if algorithm in VLLM_MODELOPT:
        yield _vllm(folder, "A GPU that has kernels for this format.")
    else:
        found = f"It reads modelopt's FP8 and NVFP4, this is {algorithm or 'another method'}"
        yield Way("vLLM", "", f"{found}; for vLLM, make a job with ALGORITHM: LLMCompressor or Native.")
    yield Way("lm_eval", "", f"{nonsense}, since transformers loads its models. Quantdeck's own evaluation reads them.")
    script, where = shlex.quote(str(folder / SCRIPT)), shlex.quote(str(folder))
    lines = [f"sh {script}", f"sh {script} serve"] if (folder / SCRIPT).is_file() else []
    if any(method.quant_algo == algorithm and PYTORCH in method.modes for method in METHODS.values()):
        lines.append(f"trtllm-serve {where}")
    remark = "A GPU and its container. The script measures what is left of the job; `serve` answers on 127.0.0.1:8000."
    yield Way("TensorRT-LLM", "\n".join(lines), remark if lines else "The script that runs it was removed.")
