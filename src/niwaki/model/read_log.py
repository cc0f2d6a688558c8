"""Noticing of a model that changes while it is read.

Every tensor is hashed as it is read. At its first read the file must be as it was in the beginning: inode, size and
times. For a write updates the change time, which no program can set. A second read must give the same bytes. In the
end, a file as in the beginning is unchanged, and of any other the ranges that were read are hashed again. So a file
that is touched or copied with the same bytes passes once it was read, and is refused before that.

    log = ReadLog.of(folder, [folder / "config.json"], [folder / "model.safetensors"])
    log.note(folder / "model.safetensors", begin, tensor)
    log.check()

`contents` is for a resume, which may come days later: it hashes whole files. So a copy with other times is the same
model, and a change whose size and times were restored is not.

Cost: one SHA-256 of what is read, measured at 0.48 GB/s on one core. In the end nothing is read if no file was written.
`contents` reads every shard once, pieces of it on all cores.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from niwaki.errors import CheckpointError
from niwaki.model.files import file_sha256
from niwaki.model.shards import TensorInfo

_READ_BYTES = 2**24
_PIECE_BYTES = 2**26  # hashed by one core; a change of it changes the hashes of large files
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
State = tuple[int, ...]


@dataclass
class ReadLog:
    """States and hashes of the files of a model: whole small files, and the ranges of shards that were read."""

    files: dict[Path, tuple[State, str]] = field(default_factory=dict)
    shards: dict[Path, State] = field(default_factory=dict)
    ranges: dict[tuple[Path, int, int], str] = field(default_factory=dict)
    whole: dict[Path, str] = field(default_factory=dict)
    headers: dict[Path, dict[str, TensorInfo]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    @classmethod
    def of(cls, files: Iterable[Path], shards: Iterable[Path]) -> "ReadLog":
        """Begin with the present states, and the hashes of `files`."""
        return cls({path: (_state(path), file_sha256(path)) for path in files}, {path: _state(path) for path in shards})

    def add(self, paths: Iterable[Path]) -> None:
        """Record the present content of further small files, those that are not known yet."""
        for path in paths:
            if path not in self.files and path.is_file():
                self.files[path] = _state(path), file_sha256(path)

    def note(self, path: Path, begin: int, tensor: Tensor) -> None:
        """Record the bytes of a tensor that begins at `begin`. Raises CheckpointError if an earlier read had others."""
        self.note_hash(path, begin, tensor.nbytes, hashlib.sha256(bytes_of(tensor)).hexdigest())

    def note_hash(self, path: Path, begin: int, nbytes: int, sha256: str) -> None:
        """Record the hash of a range. Raises CheckpointError if an earlier read had other bytes."""
        key = path, begin, nbytes
        with self._lock:
            if key not in self.ranges:
                self.confirm(path)
            if self.ranges.setdefault(key, sha256) != sha256:
                raise changed(path)

    def confirm(self, path: Path) -> None:
        """Raise CheckpointError if a shard may have other bytes than in the beginning."""
        if path in self.shards and not (path.is_file() and _as_before(self.shards[path], _state(path))):
            raise changed(path)

    def contents(self) -> dict[Path, str]:
        """Return a hash of the content of every file and shard. Every shard is read once."""
        self.whole = self.whole or _content_hashes(self.shards)
        return {path: sha256 for path, (_, sha256) in self.files.items()} | self.whole

    def check(self) -> None:
        """Raise CheckpointError if what was read is no longer what the files hold."""
        for path, (state, sha256) in self.files.items():
            if not path.is_file() or (_state(path) != state and file_sha256(path) != sha256):
                raise changed(path)
        for path, state in self.shards.items():
            if not path.is_file():
                raise changed(path)
            if _state(path) != state:
                self._check_ranges(path)
                if path in self.whole and _content_hashes([path])[path] != self.whole[path]:
                    raise changed(path)

    def _check_ranges(self, path: Path) -> None:
        ranges = {key: sha256 for key, sha256 in self.ranges.items() if key[0] == path}
        if not (ranges or path in self.whole):
            self.confirm(path)
        with path.open("rb") as file:
            for (_, begin, nbytes), sha256 in ranges.items():
                file.seek(begin)
                found = hashlib.sha256()
                for done in range(0, nbytes, _READ_BYTES):
                    found.update(file.read(min(_READ_BYTES, nbytes - done)))
                if found.hexdigest() != sha256:
                    raise changed(path)


def read_tensor(path: Path, name: str, dtype: str, shape: tuple[int, ...], begin: int, *, pinned: bool) -> Tensor:
    """Read one tensor of a safetensors file, without mapping the file: a file that is cut would end the process."""
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} is stored as {dtype}, which this torch cannot read")
    tensor = torch.empty(shape, dtype=DTYPES[dtype], pin_memory=pinned)
    if not path.is_file():
        raise changed(path)
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        view = bytes_of(tensor)
        done = 0
        while done < tensor.nbytes:
            count = file.readinto(view[done : done + _READ_BYTES])
            if not count:
                raise changed(path)
            done += count
    return tensor


def read_run(path: Path, run: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Read tensors that follow each other in a file, in one call to the system. Memory and checks as `read_tensor`."""
    if len(run) == 1:
        ((name, info),) = run.items()
        return {name: read_tensor(path, name, info.dtype, info.shape, info.begin, pinned=False)}
    if unknown := next((name for name, info in run.items() if info.dtype not in DTYPES), None):
        raise CheckpointError(f"{path}: {unknown} is stored as {run[unknown].dtype}, which this torch cannot read")
    tensors = {name: torch.empty(info.shape, dtype=DTYPES[info.dtype]) for name, info in run.items()}
    if not path.is_file():
        raise changed(path)
    begin = min(info.begin for info in run.values())
    with path.open("rb", buffering=0) as file:
        done = os.preadv(file.fileno(), [bytes_of(tensor) for tensor in tensors.values()], begin)
    for name, tensor in tensors.items():
        done -= tensor.nbytes
        if done < 0:  # the system read less than it was asked for
            info = run[name]
            tensors[name] = read_tensor(path, name, info.dtype, info.shape, info.begin, pinned=False)
    return tensors


def _content_hashes(paths: Iterable[Path]) -> dict[Path, str]:
    """Return, for every file, the SHA-256 of the SHA-256 of its pieces."""
    pieces = [(path, begin) for path in paths for begin in range(0, max(1, path.stat().st_size), _PIECE_BYTES)]
    hashes = {path: hashlib.sha256() for path, _ in pieces}
    with ThreadPoolExecutor(max(1, min(len(pieces), os.cpu_count() or 1)), thread_name_prefix="hash") as pool:
        for (path, _), digest in zip(pieces, pool.map(_piece_digest, *zip(*pieces, strict=True)), strict=True):
            hashes[path].update(digest)
    return {path: found.hexdigest() for path, found in hashes.items()}


def _piece_digest(path: Path, begin: int) -> bytes:
    found, end = hashlib.sha256(), begin + _PIECE_BYTES
    with path.open("rb") as file:
        file.seek(begin)
        while content := file.read(min(_READ_BYTES, end - file.tell())):
            found.update(content)
    return found.digest()


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _state(path: Path) -> State:
    status = path.stat()
    times = status.st_mtime_ns, status.st_ctime_ns
    return status.st_dev, status.st_ino, status.st_size, *times, status.st_nlink, status.st_mode


def _as_before(before: State, now: State) -> bool:
    """Check that only a link or a mode explains what is new in a state: both set the change time, and write nothing."""
    return before == now or (before[:4] == now[:4] and before[5:] != now[5:])


def changed(path: Path) -> CheckpointError:
    """Return the error for a file that changed during a run."""
    return CheckpointError(
        f"{path} changed while it was read, so nothing is published: let its download or copy finish, and run again"
    )
