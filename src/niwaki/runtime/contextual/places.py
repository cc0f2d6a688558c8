"""Places: the sets of matrices of a block that read the same input.

They are q, k and v; the output projection; gate and up; down. A model that joins some of them in one matrix has the
same places. The share of the weights that a token does not read follows from the share of inputs that it leaves out at
every place.

    places = find_places(decoder.anatomy)
    skipped_frac(places, [0.5] * len(places))
"""

from collections.abc import Sequence
from dataclasses import dataclass

from niwaki.errors import ArchitectureError
from niwaki.model.anatomy import Anatomy, Linear


@dataclass(frozen=True)
class Place:
    """Matrices `names` of one block that read the same input; `outputs` of all of them together."""

    block: int
    names: tuple[str, ...]
    inputs: int
    outputs: int

    @property
    def kind(self) -> str:
        """Return the last parts of the names, such as q_proj/k_proj/v_proj."""
        return "/".join(name.rpartition(".")[2] for name in self.names)

    @property
    def weights(self) -> int:
        """Return the number of weights."""
        return self.inputs * self.outputs


def find_places(anatomy: Anatomy) -> list[Place]:
    """Return the places of a decoder. Raises ArchitectureError for matrices that are not layers, such as experts."""
    places = []
    for index, block in enumerate(anatomy.blocks):
        for members in block.groups.values():
            if odd := next((linear for linear in members if not _is_layer(linear)), None):
                raise ArchitectureError(
                    f"block {index} {odd.name} is one of several experts: inputs are skipped in plain linear layers "
                    "only; use another method"
                )
            names = tuple(linear.name for linear in members)
            places.append(Place(index, names, members[0].columns, sum(linear.rows for linear in members)))
    return places


def _is_layer(linear: Linear) -> bool:
    return linear.expert is None and linear.stacked is None and linear.parameter == f"{linear.name}.weight"


def skipped_frac(places: Sequence[Place], shares: Sequence[float]) -> float:
    """Return the share of the weights of all places that is not read, if these shares of inputs are left out."""
    skipped = sum(place.weights * share for place, share in zip(places, shares, strict=True))
    return skipped / sum(place.weights for place in places)
