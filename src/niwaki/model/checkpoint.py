"""A model folder of safetensors, read lazily by tensor name.

Only safetensors is read, since a pickle can run code. Shard names must be plain file names. No remote code is loaded.

    checkpoint = Checkpoint.open("MODEL")
    weights = checkpoint.read(["model.layers.0.mlp.up_proj.weight"])
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from niwaki.config.sources import ROTATED, model_folder, refuse_adapter
from niwaki.errors import CheckpointError, faults_of, format_problem
from niwaki.formats.descriptors import AGAIN, RECORD_NAMES, read_descriptor, read_descriptors, read_shapes
from niwaki.formats.packed import decode_stored
from niwaki.formats.quantized import WEIGHT
from niwaki.model.aux_files import STEMS, SUFFIXES, aux_files
from niwaki.model.config_file import (
    CONFIG,
    QUANT_METHOD,
    WEIGHTS_FIELD,
    check_generation,
    config_faults,
    read_config,
    stored_quantization,
)
from niwaki.model.files import atomic_file, copy_file, file_sha256, write_text
from niwaki.model.gguf_source import gguf_folder, gguf_source
from niwaki.model.hf import build_skeleton, tied_names, weight_names
from niwaki.model.read_log import ReadLog, changed, read_tensor
from niwaki.model.shards import LENGTH_BYTES, TensorInfo, check_link, hub_commit, read_headers, read_json

FORMAT = 1  # of `quantization_config`
TEXT_FIELD = "text_config"
IMPORT_NIWAKI = (
    "these weights are packed by niwaki, and only niwaki reads them: pip install niwaki, then `import niwaki` before "
    "from_pretrained (or use niwaki.load)"
)
SHARD_BYTES = 2**30
_COPY_BYTES = 2**24  # per read of a copy
_COMPARED_ROWS = 4096
TIE = "tie_word_embeddings"
STORED_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Checkpoint:
    """A local folder, its transformers config and the headers of its shards.

    The stored tensors of packed modules are `records`. `own_head` names the head on disk if config.json ties it to the
    embeddings and its values differ. `config` then says that nothing is tied.
    """

    folder: Path
    config: Any
    tensors: dict[str, TensorInfo]
    packed: dict[str, dict[str, Any]] = field(default_factory=dict)
    shapes: dict[str, list[int]] = field(default_factory=dict)
    own_head: str = ""
    records: dict[str, TensorInfo] = field(default_factory=dict)
    log: ReadLog = field(default_factory=ReadLog, compare=False)

    @classmethod
    def open(cls, model: str | Path, linked_to: Path | None = None) -> "Checkpoint":
        """Open a local folder, a GGUF file or a hub id. Raises CheckpointError with one line for anything unusable.

        Links out of the folder are refused, except to the folder `linked_to` and in the cache of the hub.

        Packed modules of niwaki appear among the tensors as their decoded weights, and `packed` describes them.
        `shapes` holds the matrices whose shape differs from the config (see `niwaki.model.hf`).
        """
        folder = local_folder(str(model))
        files = [folder / CONFIG, *aux_files(folder, lambda path: check_link(folder, path, linked_to))]
        for path in files:
            check_link(folder, path, linked_to)
        content = read_json(folder / CONFIG)
        stored = stored_quantization(folder, content)
        modules, shapes = read_quantization(stored)
        headers = read_headers(folder, None if stored else content.get(WEIGHTS_FIELD), linked_to)
        config = read_config(folder, content, headers)
        check_generation(folder)
        with config_faults(folder):
            tensors, records = _as_plain(headers, modules, config.dtype)
        log = ReadLog.of(files, [folder / shard for shard in sorted({info.shard for info in headers.values()})])
        for name, info in headers.items():
            log.headers.setdefault(folder / info.shard, {})[name] = info
        with config_faults(folder):
            return cls(folder, config, tensors, modules, shapes, records=records, log=log)._untied()

    def _untied(self) -> "Checkpoint":
        """Return the checkpoint, its config without ties if the file holds a head that differs from the embeddings.

        transformers decides in the same way, after it has read both.
        """
        text = self.config.get_text_config()
        if not (getattr(self.config, TIE, False) or getattr(text, TIE, False)):
            return self
        tables = [info for info in self.tensors.values() if len(info.shape) == 2 and info.shape[0] == text.vocab_size]
        if len(tables) < 2:
            return self
        skeleton = build_skeleton(self.config, torch.float32)
        pairs = tied_names(skeleton, weight_names(skeleton, self.tensors))
        if all(self._same_values(sources[0], targets[0]) for sources, targets in pairs):
            return self
        for config in self.config, text:
            setattr(config, TIE, False)
        return replace(self, own_head=pairs[0][1][0])

    def _same_values(self, one: str, other: str) -> bool:
        """Return whether two tensors hold the same values. Reads rows at a time, to the first difference."""
        infos = [self.tensors[name] for name in (one, other)]
        if infos[0].shape != infos[1].shape:
            return False
        if any(name.removesuffix(WEIGHT) in self.packed for name in (one, other)):
            return False  # a tied head has no codes of its own
        with ExitStack() as stack:
            slices = [
                stack.enter_context(safe_open(self.folder / info.shard, framework="pt")).get_slice(name)
                for name, info in zip((one, other), infos, strict=True)
            ]
            return all(
                torch.equal(slices[0][begin : begin + _COMPARED_ROWS], slices[1][begin : begin + _COMPARED_ROWS])
                for begin in range(0, infos[0].shape[0], _COMPARED_ROWS)
            )

    @property
    def source(self) -> dict[str, Any]:
        """Return the place of the model for a record: its folder or GGUF file, and the facts or the commit of it."""
        gguf = gguf_source(self.folder)
        if gguf is not None:
            return {"source": gguf["file"], "gguf": gguf}
        return {"source": str(self.folder), **hub_commit(self.folder), **self._rotation()}

    def _rotation(self) -> dict[str, Any]:
        """Return where a model in another basis came from, as the field `rotated`; {} for any other model."""
        if (record := self._rotation_record()) is None:
            return {}
        with self._rotation_faults():
            before = record["model"]
            about = {"source": before["source"], "bytes": before["bytes"]}
            about |= {name: record["rotate"][name] for name in ("target", "residual", "heads", "seed")}
            # The folder of a first step is gone when its record is read, so the model before stands for it.
            first = ("source", "hub_id", "revision", "gguf") if "identity" in record else ()
            return {name: before[name] for name in first if name in before} | {"rotated": about}

    def before_rotation(self) -> "Checkpoint":
        """Return the model that this one is in another basis: the name of its function in all bases.

        Return this one if it has the basis that it was made in, or if that model is gone or has changed.
        """
        found, seen = self, {self.folder}
        while (record := found._rotation_record()) is not None:
            with found._rotation_faults():
                source, files = Path(record["model"]["source"]), record["model"]["files"]
            try:
                before = Checkpoint.open(source) if source.exists() else None
            except CheckpointError:
                before = None
            if before is None or before.folder in seen or before.file_hashes() != files:
                break
            found = before
            seen.add(found.folder)
        return found

    def _rotation_record(self) -> dict[str, Any] | None:
        path = self.folder / ROTATED
        if not path.is_file():
            return None
        with self._rotation_faults():
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record

    def _rotation_faults(self) -> AbstractContextManager[None]:
        return faults_of(f"{self.folder / ROTATED} is not a record of niwaki", "remove it, or rotate again")

    def config_content(self) -> dict[str, Any]:
        """Return the content of config.json, with the ties as the weights have them."""
        content: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
        if self.own_head:
            content[TIE] = False
            for section in content.values():
                if isinstance(section, dict) and section.get(TIE):
                    section[TIE] = False
        return content

    def require_plain(self) -> None:
        """Raise CheckpointError for a checkpoint that is quantized or packed already."""
        if self.packed:
            what, way = "quantized", "start from the bf16, fp16 or fp32 checkpoint"
            if all("sparse" in about for about in self.packed.values()):
                what, way = (
                    "packed",
                    "use --pack none to compress it further, or start from the dense checkpoint",
                )
            raise CheckpointError(f"{self.folder} is already {what}: {way}")

    @property
    def shards(self) -> list[str]:
        """Return the sorted file names of the shards."""
        return sorted({info.shard for info in (*self.tensors.values(), *self.records.values())})

    @property
    def nbytes(self) -> int:
        """Return the bytes of all shard files, headers included."""
        return sum((self.folder / shard).stat().st_size for shard in self.shards)

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of weights with the most stored bytes."""
        totals: dict[str, int] = {}
        for info in self.tensors.values():
            totals[info.dtype] = totals.get(info.dtype, 0) + info.nbytes
        # A decoder refuses other dtypes among the tensors that it reads; what it does not read may have any.
        usable = {name: total for name, total in totals.items() if name in STORED_DTYPES} or totals
        name = max(usable, key=lambda dtype: usable[dtype])
        if name not in STORED_DTYPES:
            raise CheckpointError(f"{self.folder} stores its weights as {name}: expected F32, F16 or BF16")
        return STORED_DTYPES[name]

    def read(self, names: Iterable[str], *, pinned: bool = False) -> dict[str, Tensor]:
        """Read tensors by name to the CPU, as stored. `pinned` tensors move to CUDA without another copy.

        Raises CheckpointError with the name of the first tensor that is not finite.
        """
        packed: dict[str, dict[str, Any]] = {}
        found: dict[str, Tensor] = {}
        for name in names:
            module = name.removesuffix(WEIGHT)
            if module in self.packed:
                packed[module] = self.packed[module]
            for stored in _stored_as(name, self.packed):
                info = self.records[stored] if module in self.packed else self.tensors[name]
                path = self.folder / info.shard
                found[stored] = read_tensor(path, stored, info.dtype, info.shape, info.begin, pinned=pinned)
                self.log.note(path, info.begin, found[stored])
        found = decode_stored(found, packed, self.dtype) if packed else found
        for name, tensor in found.items():
            # Min and max of a tensor are NaN or infinite exactly if an element is.
            if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
                raise CheckpointError(
                    f"{self.folder / self.tensors[name].shard}: {name} holds NaN or infinite values: "
                    "repair or download the checkpoint again"
                )
        return found

    def copy(self, names: Mapping[str, str], path: Path) -> str:
        """Write one shard with the tensors `names` (new name → name here), byte for byte. Return its SHA-256.

        Any dtype passes, also one that torch does not know, and packed modules stay packed. Memory stays small.
        """
        infos = self.stored_infos(names)
        # Wide elements first, as the format asks for: every tensor then begins at a multiple of its element.
        order = sorted(infos, key=lambda new: (-infos[new].nbytes // max(1, math.prod(infos[new].shape)), new))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for new in order:
            begin, end = end, end + infos[new].nbytes
            header[new] = {"dtype": infos[new].dtype, "shape": infos[new].shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % LENGTH_BYTES)
        with atomic_file(path) as temporary:
            with temporary.open("wb") as target:
                target.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
                for new in order:
                    self._copy_bytes(infos[new], target)
            return file_sha256(temporary)

    def stored_infos(self, names: Mapping[str, str]) -> dict[str, TensorInfo]:
        """Return the tensors in the files by new name, for `names` (new name → name here).

        A packed module has several, which keep their names.
        """
        infos: dict[str, TensorInfo] = {}
        for new, name in names.items():
            if name.removesuffix(WEIGHT) in self.packed:
                infos |= {stored: self.records[stored] for stored in _stored_as(name, self.packed)}
            else:
                infos[new] = self.tensors[name]
        return infos

    def _copy_bytes(self, info: TensorInfo, target: BinaryIO) -> None:
        """Append the bytes of one tensor to `target`."""
        path, digest = self.folder / info.shard, hashlib.sha256()
        with path.open("rb") as source:
            source.seek(info.begin)
            for done in range(0, info.nbytes, _COPY_BYTES):
                wanted = min(_COPY_BYTES, info.nbytes - done)
                if len(part := source.read(wanted)) != wanted:
                    raise changed(path)
                digest.update(part)
                target.write(part)
        self.log.note_hash(path, info.begin, info.nbytes, digest.hexdigest())

    def fingerprint(self) -> dict[str, str]:
        """Return a hash of the content of every file that decides or becomes a part of a result, by relative path."""
        return {str(path.relative_to(self.folder)): sha256 for path, sha256 in self.log.contents().items()}

    def dated_fingerprint(self) -> dict[str, str]:
        """Return the fingerprint of version 0.1: the hash of a shard is of its size, modification time and header."""
        hashes = {CONFIG: self.log.files[self.folder / CONFIG][1]}
        for shard in self.shards:
            header = json.dumps(sorted((n, i.dtype, i.shape) for n, i in self.tensors.items() if i.shard == shard))
            status = (self.folder / shard).stat()
            state = f"{status.st_size}:{status.st_mtime_ns}:{header}"
            hashes[shard] = hashlib.sha256(state.encode()).hexdigest()
        return hashes

    def file_hashes(self) -> dict[str, dict[str, Any]]:
        """Return bytes and hash per file: of the whole config, and of the header of a shard (names, shapes)."""
        config = self.folder / "config.json"
        hashes: dict[str, dict[str, Any]] = {"config.json": {"bytes": config.stat().st_size}}
        hashes["config.json"]["sha256"] = file_sha256(config)
        for shard in self.shards:
            path = self.folder / shard
            with path.open("rb") as file:
                prefix = file.read(LENGTH_BYTES)
                header = file.read(int.from_bytes(prefix, "little"))
            digest = hashlib.sha256(prefix + header).hexdigest()
            hashes[shard] = {"bytes": path.stat().st_size, "header_sha256": digest}
        return hashes

    def copy_aux_files(self, folder: Path) -> None:
        """Copy `aux_files` to a result. Its config.json has the ties as the weights have them."""
        for source in aux_files(self.folder):
            target = folder / source.relative_to(self.folder)
            target.parent.mkdir(exist_ok=True)
            copy_file(source, target)
        if self.own_head:
            write_text(folder / "config.json", json.dumps(self.config_content(), indent=2) + "\n")


def cut_to_shards(names: Iterable[str], tensors: Mapping[str, TensorInfo]) -> list[list[str]]:
    """Cut `names` in their order into shards of about 1 GiB."""
    parts: list[list[str]] = [[]]
    filled = 0
    for name in names:
        if parts[-1] and filled + tensors[name].nbytes > SHARD_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(name)
        filled += tensors[name].nbytes
    return [part for part in parts if part]


def local_folder(model: str) -> Path:
    """Return the folder of a model, which is fetched first for a hub id, or made first of a GGUF file.

    Raises CheckpointError if there is none, or if it holds an adapter.
    """
    folder = fetched_folder(str(model_folder(model) or model))
    refuse_adapter(folder)
    return folder


def fetched_folder(model: str) -> Path:
    """Return a local folder as it is, that of a GGUF file, or fetch a hub id. Raises CheckpointError if that fails."""
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if file := model_folder(model):  # raises for what cannot be a hub id
        return gguf_folder(file)
    from huggingface_hub import snapshot_download

    patterns = ["*.safetensors", "*.py", *(f"*{suffix}" for suffix in sorted(SUFFIXES))]
    patterns += [f"{stem}*" for stem in STEMS]
    name, _, revision = model.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own, HTTP and OS errors alike
        reason = str(error).strip().split("\n")[0][:160]
        raise CheckpointError(
            f"{model} is not a local folder and could not be fetched as a hub id ({reason})"
        ) from error


def _stored_as(name: str, packed: Mapping[str, Mapping[str, Any]]) -> list[str]:
    module = name.removesuffix(WEIGHT)
    if module not in packed:
        return [name]
    return [f"{module}.{key}" for key in read_descriptor(module, packed[module]).names()]


def _as_plain(
    tensors: dict[str, TensorInfo], packed: Mapping[str, Mapping[str, Any]], dtype: torch.dtype
) -> tuple[dict[str, TensorInfo], dict[str, TensorInfo]]:
    """Return the headers with each packed module as one weight, whose `nbytes` are the stored ones; and its own ones.

    Raises CheckpointError if a tensor of a packed module is missing, or is not what its description says.
    """
    plain = dict(tensors)
    records: dict[str, TensorInfo] = {}
    label = next((name for name, known in STORED_DTYPES.items() if known == dtype), "") if packed else ""
    if packed and not label:
        raise CheckpointError(
            f"config.json gives packed weights the dtype {dtype}: expected float32, float16 or bfloat16"
        )
    for module, descriptor in read_descriptors(packed).items():
        infos = {name: plain.pop(f"{module}.{name}") for name in RECORD_NAMES if f"{module}.{name}" in plain}
        descriptor.check_header({name: (info.dtype, info.shape) for name, info in infos.items()})
        if module + WEIGHT in plain:
            raise CheckpointError(f"{module} is packed and has a plain {module}{WEIGHT} too: expected one of them")
        records |= {f"{module}.{name}": info for name, info in infos.items()}
        own, nbytes = [infos[name] for name in descriptor.names()], sum(info.nbytes for info in infos.values())
        plain[module + WEIGHT] = TensorInfo(own[0].shard, label, (descriptor.rows, descriptor.columns), nbytes)
    return plain, records


def read_quantization(stored: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], dict[str, list[int]]]:
    """Return the descriptions and the shapes of a `quantization_config`. Raises CheckpointError for another content."""
    if unknown := [name for name in stored if name not in quantization({}, {})]:
        raise CheckpointError(f"quantization_config of config.json has an unknown field {unknown[0]!r}: {AGAIN}")
    if stored and (problem := format_problem(stored.get("format", FORMAT), (FORMAT,))):
        raise CheckpointError(f"the quantization_config of the model {problem}")
    modules = stored.get("modules", {})
    read_descriptors(modules)
    return dict(modules), read_shapes(stored.get("shapes", {}))


def quantization(modules: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return the `quantization_config` of config.json for packed modules and matrices with their own shape."""
    return {"quant_method": QUANT_METHOD, "format": FORMAT, "modules": dict(modules), "shapes": dict(shapes)}


def quantized_config(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> str:
    """Return the text of a config.json with the content `config` and this `quantization_config`."""
    return json.dumps(with_quantization(config, quantization), indent=2) + "\n"


def with_quantization(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with this `quantization_config`.

    transformers ignores a quantization it does not know, and then draws random weights. Without niwaki it must stop
    instead. `WEIGHTS_FIELD` names the file of weights. Every version from 5.0 on raises an error for a name that does
    not end with `.safetensors`, and shows the name. `NiwakiQuantizer` removes the field again. The text config of a
    wrapper has the field too, because `AutoModelForCausalLM` may load the text model with it alone.
    """
    stop = {WEIGHTS_FIELD: IMPORT_NIWAKI} if quantization.get("quant_method") == QUANT_METHOD else {}

    def stopped(part: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in part.items() if name != WEIGHTS_FIELD} | stop

    text = config.get(TEXT_FIELD)
    nested = {TEXT_FIELD: stopped(text)} if isinstance(text, Mapping) else {}
    return stopped(config) | nested | {"quantization_config": dict(quantization)}
