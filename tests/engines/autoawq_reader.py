"""AutoAWQ's own code over checkpoint folders: `python -m tests.engines.autoawq_reader FOLDER...`.

Run by the interpreter of environments/autoawq. For every quantized Linear it writes to FOLDER/read.safetensors
`<name>.weight`, dequantized in float16 (out, in), and `<name>.qweight/.qzeros/.scales`, packed anew by the package
from that weight.
"""

import json
import sys
from pathlib import Path

import torch
from awq.modules.linear import WQLinear_GEMM, WQLinear_GEMV
from awq.utils.packing_utils import dequantize_gemm, reverse_awq_order, unpack_awq
from safetensors.torch import load_file, save_file


def read(folder: Path) -> None:
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    group, gemm = quantization["group_size"], quantization["version"] == "gemm"
    stored = load_file(folder / "model.safetensors")
    made = {}
    for prefix in sorted(key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")):
        qweight, qzeros, scales = (stored[f"{prefix}.{kind}"] for kind in ("qweight", "qzeros", "scales"))
        codes, zeros = unpack_awq(qweight, qzeros, 4)
        if gemm:
            weight = dequantize_gemm(qweight, qzeros, scales, 4, group).T.contiguous()
            _, zeros = reverse_awq_order(codes, zeros, 4)
            zeros = zeros & 15  # (in/g, out)
        else:
            # There is no reader of this layout outside its CUDA kernel: codes lie in order along the input.
            width = codes.shape[1] // group
            scales, zeros = scales[:, :width].contiguous(), (zeros & 15)[:, :width]  # (out, in/g)
            weight = ((codes & 15) - zeros.repeat_interleave(group, 1)) * scales.repeat_interleave(group, 1)
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float16)
        linear.weight.data = weight
        kind = WQLinear_GEMM if gemm else WQLinear_GEMV
        packed = kind.from_linear(linear, 4, group, scales=scales, zeros=zeros.half())
        made[f"{prefix}.weight"] = weight
        made |= {f"{prefix}.{key}": getattr(packed, key).contiguous() for key in ("qweight", "qzeros", "scales")}
    save_file(made, folder / "read.safetensors")


for argument in sys.argv[1:]:
    read(Path(argument))
