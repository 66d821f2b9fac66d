"""Whether this environment works: GPTQModel is there and takes a configuration."""

import torch
from gptqmodel import GPTQModel, QuantizeConfig

config = QuantizeConfig(bits=4, group_size=128, sym=False, method="gptq", format="gptq", device="cpu")
if (config.bits, config.group_size) != (4, 128):
    raise SystemExit(f"GPTQModel made {config} of 4 bits in groups of 128")
print(f"torch {torch.__version__}, {GPTQModel.__name__} ready")
