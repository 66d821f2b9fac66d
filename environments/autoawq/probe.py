"""Whether this environment works: AutoAWQ packs a small Linear and reads the same numbers back."""

import warnings

import torch

warnings.showwarning = lambda *args, **options: None  # its authors' farewell
from awq import AutoAWQForCausalLM  # noqa: E402
from awq.modules.linear import WQLinear_GEMM  # noqa: E402
from awq.utils.packing_utils import dequantize_gemm  # noqa: E402

q = torch.arange(16.0).repeat(32, 8)  # (out, in), every code
scale, zero = torch.full((1, 32), 0.5).half(), torch.full((1, 32), 8.0)  # (in/128, out)
linear = torch.nn.Linear(128, 32, bias=False).half()
linear.weight.data = ((q - 8) * 0.5).half()
packed = WQLinear_GEMM.from_linear(linear, 4, 128, scales=scale, zeros=zero)
read = dequantize_gemm(packed.qweight, packed.qzeros, packed.scales, 4, 128)  # (in, out)
if not torch.equal(read.T, linear.weight.data):
    raise SystemExit("AutoAWQ's packing does not give back the weights that went in")
print(f"torch {torch.__version__}, {AutoAWQForCausalLM.__name__} ready")
