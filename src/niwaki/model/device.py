"""Compute device and compute dtype, and the memory that they have."""

import ctypes
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

from niwaki.config.devices import NO_GPU
from niwaki.errors import InputError, unknown


def pick_device(name: str) -> torch.device:
    """Pick the device `name`; `auto` takes CUDA if there is one.

    Raises InputError for a device that this machine lacks.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}: expected cpu, cuda, cuda:1 or auto") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported: expected cpu, cuda or auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(NO_GPU.format(name, torch.cuda.device_count()))
    return device


def pick_dtype(name: str) -> torch.dtype | None:
    """Pick the compute dtype. None leaves the choice to the decoder: float32 on the CPU, else as stored."""
    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise InputError(unknown("dtype", name, known))
    return known[name]


def usable_device_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU that this process may use: all, or the share that torch is limited to."""
    share = torch.cuda.get_per_process_memory_fraction(device.index)
    return int(share * torch.cuda.get_device_properties(device).total_memory)


def free_device_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU that this process can still allocate."""
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return min(free_bytes, usable_device_bytes(device) - torch.cuda.memory_reserved(device))


def return_free_memory() -> None:
    """Return freed heap memory to the system.

    glibc keeps the tensors of each finished block in the heaps of its threads. Without this call the resident size
    grows with depth (measured: 0.87 GB at 6 blocks, 1.33 GB at 24; docs/log/2026-11-22-foundation.md).
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def peak_rss_bytes() -> int:
    """Return the peak resident memory of this process.

    Linux counts it per address space in /proc. getrusage would also count the peak of the parent process.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def to_host(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU. From CUDA it goes to pinned memory without a wait, which is several times faster."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
