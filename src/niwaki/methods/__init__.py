"""The registry: every method is one module, imported when it is used.

A method module offers `PAPER`, `NEEDS` (which statistics the walk collects), a frozen dataclass `Config` and
`compress(block, statistics, targets, config, generator) -> {matrix: Packed}` for one block.
"""

import importlib
from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch

from niwaki.block import Block
from niwaki.config import Target
from niwaki.errors import InputError, unknown
from niwaki.packed import Packed
from niwaki.statistics import Needs, Statistics

METHODS = ("magnitude", "sparsegpt", "wanda")
BEST = "sparsegpt"


class Method(Protocol):
    """What a method module offers."""

    PAPER: str
    NEEDS: Needs
    Config: type
    __doc__: str

    def compress(
        self,
        block: Block,
        statistics: Mapping[str, Statistics],
        targets: Mapping[str, Target],
        config: Any,
        generator: torch.Generator,
    ) -> dict[str, Packed]:
        """New records for every matrix in `targets`; the block itself is not changed."""


def get_method(name: str) -> Method:
    """The method module `name`. Raises InputError with the nearest name."""
    if name not in METHODS:
        raise InputError(unknown("method", name, METHODS))
    return cast(Method, importlib.import_module(f"niwaki.methods.{name}"))
