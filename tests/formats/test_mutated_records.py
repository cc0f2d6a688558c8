"""Records of strangers: a mutated one is refused with one line, or decodes and multiplies as plain Python decodes it.

`make test` tries 200 mutations of every kind, `make fuzz` 10,000, and `make test-sanitized` both against kernels that
report every wrong access to memory.
"""

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

from niwaki.errors import NiwakiError
from niwaki.formats.descriptors import read_descriptor
from niwaki.formats.packed import PackedTensors, decode_stored
from niwaki.runtime.trellis_linear import packed_class
from support.mutations import LONG, QUICK, Mutation, mutate_json, mutate_tensors, mutations
from support.packed_records import KINDS, example
from support.slow_decode import slow_decode

GROUPS = {
    "codes": [kind for kind in KINDS if kind.startswith("codes")],
    "mixed": ["mixed"],
    "bitmap": [kind for kind in KINDS if kind.startswith("bitmap")],
    "two_four": [kind for kind in KINDS if kind.startswith("two_four")],
    "tiles": ["tiles"],
    "trellis": [kind for kind in KINDS if kind.startswith("trellis")],
}


def mutated(kind: str, changes: list[Mutation]) -> PackedTensors:
    """Return an example of a kind after these changes of its description and its tensors."""
    names = GROUPS[kind]
    record = example(names[changes[0].seed % len(names)])
    description: Any = json.loads(json.dumps(record.description))
    tensors = dict(record.tensors)
    for change in changes:
        if change.action % 2:
            description = mutate_json(description, Mutation(change.action // 2, change.seed, change.value))
        else:
            tensors = mutate_tensors(tensors, Mutation(change.action // 2, change.seed, change.value))
    return PackedTensors(tensors, description)


def try_record(record: PackedTensors) -> bool:
    """Return whether a record is accepted. Fail unless it then gives the numbers of the slow decoder."""
    stored = {f"m.{name}": tensor for name, tensor in record.tensors.items()}
    try:
        descriptor = read_descriptor("m", record.description)
        descriptor.check(record.tensors)
    except NiwakiError as error:
        assert "m" in str(error) and "\n" not in str(error)
        refuses_or_skips(stored, record.description)
        return False
    expected, size = slow_decode(record)
    found = decode_stored(stored, {"m": record.description}, torch.float32)["m.weight"].double().numpy()
    close(found, expected, size, 1e-6)
    multiply(record, expected, size)
    return True


def refuses_or_skips(stored: dict[str, Tensor], description: Any) -> None:
    """Fail if a file is decoded whose record is refused. Without tensors of a module, the file is another shard."""
    try:
        assert "m.weight" not in decode_stored(stored, {"m": description}, torch.float32)
    except NiwakiError:
        return


def multiply(record: PackedTensors, expected: np.ndarray, size: np.ndarray) -> None:
    """Compare the products of every path of the CPU."""
    rows, columns = expected.shape
    layer = packed_class(record.description)(rows, columns, record.description, False)
    layer.load_state_dict(dict(record.tensors))
    generator = torch.Generator().manual_seed(0)
    for tokens in (1, 3, 9, 70):
        x = (torch.rand(tokens, columns, generator=generator) * 0.02 - 0.01).bfloat16()
        exact = x.double().numpy()
        for dtype in (torch.float32, torch.bfloat16):
            found = layer(x.to(dtype)).double().numpy()
            # Kernels round inputs to a share of the largest of 32, about 1e-4; outputs have 8 bits.
            added = np.abs(exact) @ size.T + 0.05 * np.abs(exact).max() * size.sum(1)
            close(found, exact @ expected.T, added, 2e-2)


def close(found: np.ndarray, expected: np.ndarray, size: np.ndarray, tolerance: float) -> None:
    """Fail if an element differs by more than its share of the size of what was added."""
    assert found.shape == expected.shape
    assert np.isfinite(found).all()
    assert (np.abs(found - expected) <= tolerance * size + 1e-30).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_slow_decoder_reads_what_is_written(kind: str) -> None:
    assert try_record(example(kind))


@pytest.mark.parametrize("kind", GROUPS)
def test_mutated_records_are_refused_or_give_the_same_numbers(kind: str) -> None:
    accepted: list[bool] = []
    QUICK(given(changes=mutations())(lambda changes: accepted.append(try_record(mutated(kind, changes)))))()
    assert any(accepted) and not all(accepted)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", GROUPS)
def test_many_mutated_records_are_refused_or_give_the_same_numbers(kind: str, record_property: Any) -> None:
    accepted: list[bool] = []
    LONG(given(changes=mutations())(lambda changes: accepted.append(try_record(mutated(kind, changes)))))()
    record_property("mutations", len(accepted))
    record_property("accepted", sum(accepted))
