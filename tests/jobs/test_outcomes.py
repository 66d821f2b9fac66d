"""What is told of a program that failed."""

import pytest

from backend.jobs.outcomes import CODES, advice, classify, memory_kills, outcome_of, outcome_of_text


@pytest.mark.parametrize(
    ("code", "facts", "outcome"),
    [
        (-9, {"memory_kill": True}, "out_of_memory"),
        (137, {"memory_kill": True}, "out_of_memory"),
        (-9, {}, "engine_crashed"),
        (-11, {"memory_kill": True}, "engine_crashed"),
        (-6, {"tail": ["terminate called after throwing an instance of 'std::bad_alloc'"]}, "out_of_memory"),
        (1, {"kind": "MemoryError"}, "out_of_memory"),
        (1, {"kind": "RuntimeError", "message": "[enforce fail] DefaultCPUAllocator: can't allocate memory"},
         "out_of_memory"),
        (1, {"kind": "OutOfMemoryError", "message": "CUDA out of memory. Tried to allocate 1 GiB"},
         "gpu_out_of_memory"),
        (-6, {"tail": ["RuntimeError: CUDA error: out of memory"]}, "gpu_out_of_memory"),
        (1, {"kind": "RuntimeError", "message": "CUDA error: device-side assert triggered"}, "engine_failed"),
        (-6, {"tail": ["NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus."]}, "gpu_lost"),
        (1, {"kind": "NVMLError_GpuIsLost", "message": "GPU is lost"}, "gpu_lost"),
        (1, {"kind": "RuntimeError", "message": "CUDA error: uncorrectable ECC error encountered"}, "gpu_lost"),
        (2, {"kind": "ConfigError", "message": "no such key"}, "bad_input"),
        (1, {"kind": "CheckpointError", "message": "truncated"}, "bad_input"),
        (1, {"kind": "ValueError", "message": "shapes differ"}, "engine_failed"),
        (3, {}, "engine_crashed"),
    ],
)  # fmt: skip
def test_the_outcome_of_a_program(code, facts, outcome):
    assert classify(code, **facts) == outcome


def test_every_outcome_has_its_advice_and_errors_have_their_outcome():
    assert all(advice(code).endswith(".") for code in CODES) and advice("unheard of") == ""
    assert outcome_of(ValueError("x")) == "internal_error" and outcome_of(OSError(28, "No space")) == "disk_full"
    assert outcome_of_text("all went well") is None
    assert memory_kills() is None or memory_kills() >= 0
