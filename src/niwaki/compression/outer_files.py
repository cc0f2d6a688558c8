"""Files of a result that hold no block: embeddings, norms and head, towers, and tensors that no module reads.

Embeddings and head that a recipe packs are rounded on the way. Everything else is copied, codes as codes.

    outer = OuterFiles.of(decoder, packed_embeddings, recipe)
    outer.write(folder, writer, shard_names)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from niwaki.compression.carried import Carried
from niwaki.compression.embeddings import TensorNames, read_packed
from niwaki.compression.result_folder import ResultFolder, Writer
from niwaki.compression.totals import packed_modules
from niwaki.config.recipe import Recipe
from niwaki.formats.packed import decode_shard
from niwaki.formats.quantized import WEIGHT
from niwaki.model.checkpoint import cut_to_shards
from niwaki.model.decoder import Decoder


@dataclass(frozen=True)
class OuterFiles:
    """Tensors outside the blocks by file. `outer`: what text runs; `copied`: towers, and what no module reads.

    `packed_embeddings` are the modules that become codes in this run, with the names of their tensors on disk.
    """

    decoder: Decoder
    packed_embeddings: TensorNames
    recipe: Recipe
    outer: list[list[str]]
    copied: list[list[str]]

    @classmethod
    def of(cls, decoder: Decoder, packed_embeddings: TensorNames, recipe: Recipe) -> "OuterFiles":
        """Cut the tensors outside the blocks into files of about 1 GiB."""
        tensors = decoder.checkpoint.tensors
        unread = () if recipe.drop_unused else decoder.unread.names
        copied = cut_to_shards([*decoder.tower_names, *unread], tensors)
        return cls(decoder, packed_embeddings, recipe, cut_to_shards(decoder.disk_names(None), tensors), copied)

    def __len__(self) -> int:
        return len(self.outer) + len(self.copied)

    def write(
        self, folder: ResultFolder, writer: Writer, shard_names: Sequence[str],
        left: Callable[[Sequence[str]], Mapping[str, str]],
    ) -> None:  # fmt: skip
        """Write all files that are not finished. `left`: new name → name of copied tensors, as far as they are left.

        A file whose tensors all belong to removed blocks is not written.
        """
        checkpoint = self.decoder.checkpoint
        for number, (names, shard) in enumerate(zip(self.outer, shard_names[: len(self.outer)], strict=True)):
            if (part := _outer_part(number)) in folder.finished:
                continue
            if any(name.removesuffix(WEIGHT) in checkpoint.packed for name in names):
                lines = Carried.of(self.decoder).outer_lines(names)
                writer.copy(part, shard, checkpoint, {name: name for name in names}, lines)
                continue
            tensors, lines = read_packed(
                checkpoint, names, self.packed_embeddings, self.recipe.embeddings, self.decoder.device
            )
            writer.write(part, shard, tensors, lines)
        for number, (names, shard) in enumerate(zip(self.copied, shard_names[len(self.outer) :], strict=True)):
            part = f"copied-{number:05d}"
            if part not in folder.finished and (kept := left(names)):
                writer.copy(part, shard, checkpoint, kept)

    def stored(self, folder: ResultFolder) -> dict[str, Tensor]:
        """Return embeddings, final norm and head as every reader of the result will see them."""
        tensors: dict[str, Tensor] = {}
        for number in range(len(self.outer)):
            entry = folder.finished[_outer_part(number)]
            modules = packed_modules([entry], self.decoder.disk_module)
            tensors |= decode_shard(folder.path / str(entry.shard), modules, self.decoder.checkpoint.dtype)
        return tensors


def _outer_part(number: int) -> str:
    """Return the name of a file of `outer` in the journal."""
    return f"embeddings-{number:05d}"
