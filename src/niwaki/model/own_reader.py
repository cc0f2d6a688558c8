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
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

from torch import Tensor

from niwaki.errors import CheckpointError
from niwaki.model.read_log import ReadLog, read_tensor
from niwaki.model.shards import TensorInfo, read_header

_OPENER = "safe_open"  # what the loader of transformers opens a file with
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

        def opened(path: str | Path, *arguments: Any, **options: Any) -> Any:
            # The loader may write a path in another way than the log.
            known = next((shard for shard in log.shards if shard.is_file() and shard.samefile(path)), None)
            if known is None:
                return before(path, *arguments, **options)
            return _File(known, read_header(known), log, hashed)

        setattr(loader, _OPENER, opened)
        try:
            yield
        finally:
            setattr(loader, _OPENER, before)


@dataclass(frozen=True, eq=False)
class _Slice:
    """Tensor of a file, read when it is indexed."""

    path: Path
    name: str
    info: TensorInfo
    log: ReadLog
    hashed: bool

    def get_shape(self) -> list[int]:
        return list(self.info.shape)

    def get_dtype(self) -> str:
        return self.info.dtype

    def __getitem__(self, index: Any) -> Tensor:
        tensor = read_tensor(self.path, self.name, self.info.dtype, self.info.shape, self.info.begin, pinned=False)
        if self.hashed:
            self.log.note(self.path, self.info.begin, tensor)
        else:
            self.log.confirm(self.path)
        return tensor[index]


@dataclass(frozen=True, eq=False)
class _File:
    """Open safetensors file, with the methods of `safe_open` that the loader calls."""

    path: Path
    header: dict[str, TensorInfo]
    log: ReadLog
    hashed: bool

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        """Close nothing: every read opens the file."""

    def metadata(self) -> dict[str, str]:
        return {"format": "pt"}

    def keys(self) -> list[str]:
        return list(self.header)

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self.path, name, self.header[name], self.log, self.hashed)

    def get_tensor(self, name: str) -> Tensor:
        return self.get_slice(name)[...]
