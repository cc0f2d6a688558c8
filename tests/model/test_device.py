"""Devices by name, and the memory of this process."""

import subprocess
import sys

import pytest
import torch

from niwaki.errors import InputError
from niwaki.model.device import peak_rss_bytes, pick_device, pick_dtype, return_free_memory


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("tpu", "meta", "cuda:99"):
        with pytest.raises(InputError, match="device"):
            pick_device(name)


def test_dtypes() -> None:
    assert pick_dtype("auto") is None
    assert pick_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(InputError, match="did you mean 'float32'"):
        pick_dtype("float23")


def test_peak_follows_allocation_and_not_the_parent() -> None:
    before = peak_rss_bytes()
    block = torch.ones(64 * 2**20)
    assert peak_rss_bytes() >= max(before, block.nbytes)
    script = "from niwaki.model.device import peak_rss_bytes; print(peak_rss_bytes())"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(child.stdout) < peak_rss_bytes()
    return_free_memory()
