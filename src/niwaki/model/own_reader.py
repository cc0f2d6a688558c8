"""Loading by transformers through niwaki's reader of files.

transformers maps a file into memory. On a CPU its weights stay views of that map. So a later write to the file changes
the loaded model, and a cut of the file ends the process. Here it reads copies, and what it reads can be hashed as well.

    with own_reader(checkpoint.log, hashed=True):
        model = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    checkpoint.log.check()

Cost: the weights are in memory of their own, not in the page cache alone. With `hashed`, one SHA-256 of them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import Any

from torch import Tensor

from niwaki.errors import CheckpointError
from niwaki.model.read_log import ReadLog, read_run
from niwaki.model.shards import TensorInfo, read_header

RUN_BYTES, RUN_TENSORS = 2**24, 512  # read at once; the system allows 1,024 tensors
_OPENER = "safe_open"  # what the loader of transformers opens a file with
_headers: list[dict[Path, dict[str, TensorInfo]]] = []  # of the checkpoints that are being loaded, the last one inside
_lock = RLock()  # the loader belongs to the whole process


@contextmanager
def own_reader(log: ReadLog, *, hashed: bool = False) -> Iterator[None]:
    """Open the shards of `log` for transformers through `read_tensor`. With `hashed`, the log records what it read.

    Other files, such as those that another thread loads, are opened by safetensors.

    Raises CheckpointError for a version of transformers that opens files in another way.
    """
    from transformers import __version__, modeling_utils

    loader: Any = modeling_utils
    if not hasattr(loader, _OPENER):
        raise CheckpointError(
            f"transformers {__version__} opens files of weights in a way that niwaki does not know: install 5.23"
        )
    with _lock:
        before = getattr(loader, _OPENER)
        _headers.append(log.headers)

        def opened(path: str | Path, *arguments: Any, **options: Any) -> Any:
            # The loader may write a path in another way than the log.
            known: Path | None = Path(path)
            if known not in log.shards:
                known = next((shard for shard in log.shards if shard.is_file() and shard.samefile(path)), None)
            if known is None:
                return before(path, *arguments, **options)
            return _File(known, log.headers.get(known) or read_header(known), log, hashed)

        setattr(loader, _OPENER, opened)
        try:
            yield
        finally:
            setattr(loader, _OPENER, before)
            _headers.pop()


def header_of(path: Path) -> dict[str, TensorInfo]:
    """Return the header of a file that is being loaded, read again unless the checkpoint was opened with it."""
    known = _headers[-1].get(path) if _headers else None
    return known or read_header(path)


@dataclass(frozen=True, eq=False)
class _Slice:
    """Tensor of a file, read when it is indexed."""

    file: "_File"
    name: str
    info: TensorInfo

    def get_shape(self) -> list[int]:
        return list(self.info.shape)

    def get_dtype(self) -> str:
        return self.info.dtype

    def __getitem__(self, index: Any) -> Tensor:
        return self.file.read(self.name)[index]


@dataclass(frozen=True, eq=False)
class _File:
    """Open safetensors file, with the methods of `safe_open` that the loader calls.

    Tensors that follow each other are read together: the loader asks for them in about this order. `waiting` are those
    that were not asked for yet.
    """

    path: Path
    header: dict[str, TensorInfo]
    log: ReadLog
    hashed: bool
    waiting: dict[str, Tensor] = field(default_factory=dict)

    def read(self, name: str) -> Tensor:
        """Return a tensor, read now or with its neighbours. Raises CheckpointError if the file has changed."""
        if name not in self.waiting:
            self.waiting.update(read_run(self.path, self._run(name)))
            self.log.confirm(self.path)
        tensor = self.waiting.pop(name)
        if self.hashed:
            self.log.note(self.path, self.header[name].begin, tensor)
        return tensor

    def _run(self, first: str) -> dict[str, TensorInfo]:
        """Return a tensor and those that follow it in the file, up to RUN_BYTES in all."""
        order = self.order
        run: dict[str, TensorInfo] = {}
        end = 0
        for name in order[order.index(first) :]:
            end += self.header[name].nbytes
            if run and (end > RUN_BYTES or len(run) == RUN_TENSORS or name in self.waiting):
                break
            run[name] = self.header[name]
        return run

    @cached_property
    def order(self) -> list[str]:
        """Return the names in the order of the file."""
        return sorted(self.header, key=lambda name: self.header[name].begin)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        """Close nothing: every read opens the file."""

    def metadata(self) -> dict[str, str]:
        return {"format": "pt"}

    def keys(self) -> list[str]:
        return list(self.header)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self, name, self.header[name])

    def get_tensor(self, name: str) -> Tensor:
        return self.get_slice(name)[...]
