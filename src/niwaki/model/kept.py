"""Weights of the blocks that stay dense: what they are, why, and their share of the bytes of the blocks.

The anatomy names every weight of two or more dimensions that is not a matrix to compress, with its reason. A result
stores them unchanged. Biases and norms of one dimension are not counted.

    kept = Kept.of(anatomy, names, checkpoint)
    kept.weights["mixer.conv1d.weight"].bytes
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from niwaki.model.anatomy import Anatomy
from niwaki.model.checkpoint import Checkpoint
from niwaki.model.hf import WeightNames
from niwaki.model.unread import size_text

SHOWN_WEIGHTS = 24


class KeptWeight(NamedTuple):
    """Reason for one weight, the number of the blocks that have it, and its bytes in all of them."""

    reason: str
    blocks: int
    bytes: int


@dataclass(frozen=True)
class Kept:
    """Weights that stay dense, by their name inside a block, and the bytes of all blocks."""

    weights: dict[str, KeptWeight]
    blocks_bytes: int

    @classmethod
    def of(cls, anatomy: Anatomy, names: WeightNames, checkpoint: Checkpoint) -> "Kept":
        """Return what stays dense in the blocks of `anatomy`. A weight that blocks share counts once."""
        stored: dict[str, int] = {}
        for name, parameter in names.parameters.items():
            stored[parameter] = stored.get(parameter, 0) + checkpoint.tensors[name].nbytes
        found: dict[str, KeptWeight] = {}
        for index, block in enumerate(anatomy.blocks):
            for name, reason in block.kept_dense.items():
                before = found.get(name, KeptWeight(reason, 0, 0))
                nbytes = stored.get(anatomy.prefix(index) + name, 0)
                found[name] = KeptWeight(before.reason, before.blocks + 1, before.bytes + nbytes)
        total = sum(nbytes for name, nbytes in stored.items() if name.startswith(f"{anatomy.path}."))
        return cls(found, total)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all of them."""
        return sum(weight.bytes for weight in self.weights.values())

    @property
    def share(self) -> float:
        """Return their share of the bytes of the blocks."""
        return self.nbytes / max(self.blocks_bytes, 1)

    def record(self) -> dict[str, Any]:
        """Return the field `kept_dense` of run.json."""
        weights = {name: weight._asdict() for name, weight in self.weights.items()}
        return {"bytes": self.nbytes, "share": round(self.share, 6), "weights": weights}

    def message(self) -> str:
        """Return a line that names the largest weights with their reasons."""
        largest = sorted(self.weights.items(), key=lambda item: -item[1].bytes)
        named = [f"{name} ({weight.reason})" for name, weight in largest[:SHOWN_WEIGHTS]]
        if len(largest) > SHOWN_WEIGHTS:
            named.append(f"{len(largest) - SHOWN_WEIGHTS} more, see run.json")
        size = f"{size_text(self.nbytes)}, {self.share:.2%} of the blocks"
        return f"weights of the blocks that stay dense ({size}): {', '.join(named)}"
