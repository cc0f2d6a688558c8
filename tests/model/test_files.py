"""Writing: complete files or none."""

import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from niwaki.errors import OutputError
from niwaki.model.files import atomic_file, write_shard


def test_write_is_atomic(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.txt"]


def test_full_disk_leaves_no_partial_file(tmp_path: Path) -> None:
    """A real write failure: the process may not write files beyond 64 KiB."""
    script = f"""
import resource, signal, torch
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from pathlib import Path
from niwaki.model.files import write_shard
from niwaki.errors import OutputError
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    write_shard(Path({str(tmp_path)!r}) / "model.safetensors", {{"w": torch.zeros(100_000)}})
except OutputError as error:
    print("refused:", error)
"""
    assert hasattr(signal, "SIGXFSZ") and resource.RLIMIT_FSIZE is not None
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused: cannot write")
    assert list(tmp_path.iterdir()) == []


def test_read_only_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("safetensors.torch.save_file", refuse)
    with pytest.raises(OutputError, match="Read-only file system"):
        write_shard(tmp_path / "a.safetensors", {"w": torch.zeros(2)})
