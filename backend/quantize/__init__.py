"""The numerical core: streamed calibration, RTN, AWQ and GPTQ. Needs torch, transformers and safetensors only."""
