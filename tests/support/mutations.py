"""Mutations of packed records, of predictors and of headers of safetensors files that know their structure."""

import copy
import json
import math
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import HealthCheck, settings, strategies
from torch import Tensor

NUMBERS = [
    0, 1, -1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 24, 31, 32, 33, 40, 48, 63, 64, 65, 70, 72, 76, 80, 96, 128, 255, 256, 2**16,
    2**31 - 1, 2**31, -(2**31), 2**32, 2**62, 2**63, -(2**63), 2**64, 10**30,
]  # fmt: skip
WORDS = [
    "affine", "symmetric", "midrise", "free", "bitmap", "two_four", "two_four_tiles", "bfloat16", "float16", "float32",
    "int8", "int4", "U8", "I8", "I16", "U16", "I32", "I64", "F16", "F32", "F64", "BF16", "BOOL", "", "x", "0", "parts",
]  # fmt: skip
OTHERS: list[Any] = [True, False, None, 0.0, 1.5, 4.0, -0.5, math.inf, math.nan, [], {}, [1, 2], [[]], {"a": 1}]
DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.bfloat16, torch.bool]


# Shards of a long run have their share of the mutations, and other seeds: pytest --hypothesis-seed=SHARD.
FEW, MANY = 200, int(os.environ.get("NIWAKI_TEST_MUTATIONS", "10000"))
QUICK = settings(
    max_examples=FEW, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
LONG = settings(QUICK, max_examples=MANY, derandomize=False)


@dataclass(frozen=True)
class Mutation:
    """One change: what is done (`action`), where (`seed`), and a `value` for it."""

    action: int
    seed: int
    value: Any


def mutations() -> strategies.SearchStrategy[list[Mutation]]:
    """Return a strategy of one to three changes; one is the most frequent."""
    values = strategies.one_of(
        strategies.sampled_from(NUMBERS),
        strategies.sampled_from(WORDS),
        strategies.sampled_from(OTHERS),
        strategies.integers(-(2**70), 2**70),
    )
    numbers = strategies.integers(0, 2**32 - 1)
    return strategies.lists(strategies.builds(Mutation, numbers, numbers, values), min_size=1, max_size=3)


def mutate_json(content: Any, mutation: Mutation) -> Any:
    """Return a copy with one field set to a value, shifted, removed, added or swapped with another."""
    content = copy.deepcopy(content)
    rng = random.Random(mutation.seed)
    spots = list(_spots(content))
    if not spots:
        return mutation.value
    owner, key = rng.choice(spots)
    action = mutation.action % 8
    if action <= 2:
        owner[key] = copy.deepcopy(mutation.value)
    elif action == 3 and isinstance(owner[key], int | float):
        owner[key] += rng.choice([-1, 1, 8, -8, 32, -32])
    elif action == 4 and isinstance(owner[key], int | float):
        owner[key] = rng.choice([owner[key] * 2, owner[key] // 2, float(owner[key]), str(owner[key]), -owner[key]])
    elif action == 5:
        del owner[key]
    elif action == 6 and isinstance(owner, dict):
        owner[rng.choice(WORDS)] = copy.deepcopy(mutation.value)
    else:
        other, name = rng.choice(spots)
        if isinstance(owner[key], dict | list) or isinstance(other[name], dict | list):
            owner[key] = copy.deepcopy(other[name])
        else:
            owner[key], other[name] = other[name], owner[key]
    return content


def _spots(content: Any) -> Any:
    """Yield every place of a value: the object or list that holds it, and its key."""
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            yield content, key
            yield from _spots(content[key])


def mutate_tensors(tensors: Mapping[str, Tensor], mutation: Mutation) -> dict[str, Tensor]:
    """Return a copy with bytes, shape, dtype, name or presence of one tensor changed."""
    found = {name: tensor.clone() for name, tensor in tensors.items()}
    rng = random.Random(mutation.seed)
    if not found:
        return found
    name = rng.choice(sorted(found))
    own = found[name]
    action = mutation.action % 10
    if action <= 4 and own.numel():
        flat = own.view(-1).view(torch.uint8)
        for _ in range(rng.choice([1, 1, 2, 8])):
            flat[rng.randrange(len(flat))] = rng.choice([0, 1, 127, 128, 255, rng.randrange(256)])
    elif action == 5:
        found[name] = own.narrow(0, 0, rng.randrange(len(own))) if own.dim() and len(own) else own[None]
    elif action == 6:
        found[name] = rng.choice([own[None], own.flatten(), torch.cat([own, own]), own.flip(0)]) if own.dim() else own
    elif action == 7:
        found[name] = own.to(rng.choice(DTYPES))
    elif action == 8:
        del found[name]
    else:
        other = rng.choice(sorted(found))
        found[name], found[other] = found[other], found[name]
    return found


def mutate_bytes(file: bytes, mutation: Mutation) -> bytes:
    """Return a safetensors file with its header, the length of it, or its end changed."""
    rng = random.Random(mutation.seed)
    length = int.from_bytes(file[:8], "little")
    header, data = file[8 : 8 + length], file[8 + length :]
    action = mutation.action % 8
    if action <= 4:
        text = json.dumps(
            mutate_json(json.loads(header), Mutation(mutation.action // 8, mutation.seed, mutation.value))
        )
        return len(text.encode()).to_bytes(8, "little") + text.encode() + data
    if action == 5:
        wrong = rng.choice([0, 1, length - 1, length + 1, length + 8, 10**8, 2**31, 2**63 - 1, 2**64 - 1])
        return wrong.to_bytes(8, "little") + header + data
    if action == 6:
        return rng.choice([file[: rng.randrange(len(file))], file + b"\0" * rng.randrange(1, 64), file[:8] + data])
    at = rng.randrange(length)
    return file[:8] + header[:at] + bytes([rng.randrange(256)]) + header[at + 1 :] + data
