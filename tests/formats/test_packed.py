"""Records decode to what they claim."""

import torch

from niwaki.formats.packed import Packed


def test_masked_record() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    keep = torch.tensor([[True, False], [False, True]])
    packed = Packed.masked(weight, keep, "why")
    assert packed.kind == "masked" and packed.note == "why"
    assert packed.decode(torch.bfloat16).tolist() == [[1.0, 0.0], [0.0, 4.0]]
    assert packed.nbytes(torch.bfloat16) == 8
    assert torch.equal(weight, torch.tensor([[1.0, -2.0], [3.0, 4.0]]))


def test_a_record_carries_what_the_step_before_said() -> None:
    weight = torch.ones(1, 2)
    first = Packed("masked", weight, "a", {"row_zeros": [1], "error": 2})
    second = Packed("masked", 2 * weight, "b", {"error": 1}).after(first)
    assert (second.note, second.detail) == ("a; b", {"row_zeros": [1], "error": 1})
    assert torch.equal(second.weight_OI, 2 * weight)
    assert first.after(first).note == "a"
