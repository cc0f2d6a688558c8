"""Hidden states of all calibration windows, on the device, in RAM or in a memory-mapped file.

One buffer is enough for the whole walk: the output of a batch replaces its input. The place is chosen once from the
free memory, or the caller states it.

Legend: S windows, T tokens, D hidden size.
"""

import math
import os
from pathlib import Path
from typing import Literal, Protocol

import psutil
import torch
from torch import Tensor

from niwaki.errors import InputError, OutputError
from niwaki.model.device import free_device_bytes, usable_device_bytes

Place = Literal["device", "ram", "disk"]


class Activations:
    """A tensor [S, T, D], or [S, …], in any place, read and written in slices of windows."""

    def __init__(self, store_STD: Tensor, place: Place, device: torch.device) -> None:
        self.store_STD = store_STD
        self.place = place
        self.device = device

    @classmethod
    def allocate(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        place: Place,
        folder: Path | None = None,
        name: str = "activations.bin",
    ) -> "Activations":
        """Allocate an uninitialized buffer of `shape`. `folder` holds the file if the place is disk."""
        if place == "disk":
            if folder is None:
                raise InputError("activations on disk need a working folder")
            elements = math.prod(shape)
            _reserve(folder / name, elements * dtype.itemsize)
            flat = torch.from_file(str(folder / name), shared=True, size=elements, dtype=dtype)
            return cls(flat.view(shape), place, device)
        where = device if place == "device" else torch.device("cpu")
        pinned = place == "ram" and device.type == "cuda"
        return cls(torch.empty(shape, dtype=dtype, device=where, pin_memory=pinned), place, device)

    def __len__(self) -> int:
        return self.store_STD.shape[0]

    def read(self, rows: slice) -> Tensor:
        """Return the windows `rows` on the compute device."""
        return self.store_STD[rows].to(self.device, non_blocking=True)

    def take(self, windows: list[int]) -> Tensor:
        """Return the chosen windows, in the order given, on the compute device."""
        # Slices, not an index tensor: its copy to the GPU would make the host wait for all earlier work.
        return torch.cat([self.read(slice(window, window + 1)) for window in windows])

    def write(self, rows: slice, x_BTD: Tensor) -> None:
        """Replace windows `rows`."""
        # Only the stream that writes pinned memory reads it, so the host need not wait for the copy.
        self.store_STD[rows].copy_(x_BTD, non_blocking=self.place == "ram")


class HiddenStates(Protocol):
    """Tokens of windows with the hidden state of each: those of a `Stream`, or of a file."""

    @property
    def ids_ST(self) -> Tensor: ...

    @property
    def hidden(self) -> Activations: ...

    def __len__(self) -> int: ...


def _reserve(path: Path, nbytes: int) -> None:
    """Take the room of a file before it is mapped: a disk that fills later would end the process by a signal."""
    try:
        with path.open("ab") as file:
            if hasattr(os, "posix_fallocate") and nbytes:
                os.posix_fallocate(file.fileno(), 0, nbytes)
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}; it needs {nbytes / 1e9:.2f} GB for hidden states. Free space, or "
            "take fewer samples"
        ) from error


def choose_place(needed_bytes: int, device: torch.device, budget_bytes: int | None = None) -> Place:
    """Choose the fastest place for `needed_bytes` of hidden states that leaves room for the work.

    Hidden states take at most half of the free RAM, or an eighth of the GPU memory of this process.
    A method that learns keeps three buffers and needs still more. `budget_bytes` lowers these limits.
    """
    limit = budget_bytes if budget_bytes is not None else 2**62
    if device.type == "cuda" and needed_bytes <= min(
        limit, free_device_bytes(device), usable_device_bytes(device) // 8
    ):
        return "device"
    if needed_bytes <= min(limit, psutil.virtual_memory().available // 2):
        return "device" if device.type == "cpu" else "ram"
    return "disk"
