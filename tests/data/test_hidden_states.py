"""Hidden states behave the same wherever they lie."""

from pathlib import Path

import pytest
import torch

from niwaki.data.hidden_states import Activations, choose_place
from niwaki.errors import InputError

CPU = torch.device("cpu")


@pytest.mark.parametrize("place", ["device", "ram", "disk"])
def test_slices_come_back_as_written(tmp_path: Path, place: str) -> None:
    hidden = Activations.allocate((5, 3, 2), torch.float32, CPU, place, tmp_path)  # type: ignore[arg-type]
    x = torch.randn(5, 3, 2)
    hidden.write(slice(0, 5), x)
    hidden.write(slice(1, 3), x[1:3] * 2)
    assert torch.equal(hidden.read(slice(1, 3)), x[1:3] * 2)
    assert torch.equal(hidden.read(slice(3, 5)), x[3:])
    assert (place == "disk") == (tmp_path / "activations.bin").exists()


def test_place_follows_the_budget() -> None:
    assert choose_place(1000, CPU) == "device"
    assert choose_place(1000, CPU, budget_bytes=999) == "disk"
    assert choose_place(2**60, CPU) == "disk"


def test_disk_needs_a_folder() -> None:
    with pytest.raises(InputError, match="working folder"):
        Activations.allocate((1, 1, 1), torch.float32, CPU, "disk")


@pytest.mark.parametrize("place", ["device", "ram", "disk"])
def test_windows_are_taken_in_the_order_given(tmp_path: Path, place: str) -> None:
    hidden = Activations.allocate((5, 3, 2), torch.float32, CPU, place, tmp_path)  # type: ignore[arg-type]
    x = torch.randn(5, 3, 2)
    hidden.write(slice(0, 5), x)
    taken = hidden.take([3, 0, 3])
    assert torch.equal(taken, x[[3, 0, 3]])
    hidden.write(slice(0, 5), x + 1)
    assert torch.equal(taken, x[[3, 0, 3]])
