"""Which device a job runs on, found without importing torch."""

from __future__ import annotations

import os

import pynvml

from backend.errors import ConfigError, ConfigErrors


def gpu_names() -> list[str]:
    """Names of the NVIDIA GPUs of this machine in PCI order; empty if there is no driver or no GPU."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return [str(pynvml.nvmlDeviceGetName(h)) for h in handles]
    finally:
        pynvml.nvmlShutdown()


def choose_device(cuda_id: str) -> str:
    """The device for a `CUDA_ID`: `cuda:N` for its first number, or `cpu` on a machine without a GPU.

    Raises:
        ConfigErrors: If there are GPUs, but not that one.
    """
    names = gpu_names()
    if not names:
        return "cpu"
    number = int(cuda_id.split(",")[0])
    if number >= len(names):
        present = ", ".join(f"{i} ({name})" for i, name in enumerate(names))
        raise ConfigErrors(
            [ConfigError(f"found GPU {number}; this machine has {present}", key="CUDA_ID", value=cuda_id)]
        )
    return f"cuda:{number}"


def device_environment(device: str) -> dict[str, str]:
    """Environment variables that show a process this device alone.

    Inside such a process a GPU is always `cuda:0`.
    """
    visible = device.removeprefix("cuda:") if device != "cpu" else ""
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}


def torch_device(device: str) -> str:
    """What torch calls the device inside a process with `device_environment`."""
    return "cpu" if device == "cpu" else "cuda:0"


def describe_device(device: str) -> str:
    """The device in words, for the report."""
    if device == "cpu":
        return f"CPU, {os.cpu_count()} cores"
    names, number = gpu_names(), int(device.removeprefix("cuda:"))
    return f"GPU {number}, {names[number]}" if number < len(names) else f"GPU {number}"
