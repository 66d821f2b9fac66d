"""The numerical core: streamed calibration and AWQ on Gram matrices.

Needs torch, transformers and safetensors only.
"""

from backend.quantize.check import check_model
from backend.quantize.pipeline import quantize_awq
from backend.quantize.settings import AwqSettings, LayerReport, QuantizationReport

__all__ = ["AwqSettings", "LayerReport", "QuantizationReport", "check_model", "quantize_awq"]
