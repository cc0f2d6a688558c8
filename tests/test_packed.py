"""Records decode to what they claim."""

import torch

from niwaki.packed import Packed


def test_masked_record() -> None:
    weight = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    keep = torch.tensor([[True, False], [False, True]])
    packed = Packed.masked(weight, keep, "why")
    assert packed.kind == "masked" and packed.note == "why"
    assert packed.decode(torch.bfloat16).tolist() == [[1.0, 0.0], [0.0, 4.0]]
    assert packed.nbytes(torch.bfloat16) == 8
    assert torch.equal(weight, torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
