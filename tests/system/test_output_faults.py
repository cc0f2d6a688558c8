"""A disk that is full, read-only or shared with another run: one clear error, nothing lost, and a way to go on."""

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import niwaki
from niwaki.compression.places import alone
from niwaki.compression.rotate import rotate
from niwaki.compression.verify import check_weights, replace_files
from niwaki.errors import NiwakiError, OutputError
from niwaki.measure.compare.comparison import compare
from niwaki.model.files import writing
from support.compressions import folder_bytes, settings
from support.models import file_bytes, run, tiny_llama, write_texts

WRITES = ("fsync", "rename", "replace", "mkdir")  # what a disk without room, or a lost mount, refuses
RUNS: dict[str, dict[str, Any]] = {
    "walk": {"method": "wanda", "target": "2:4"},
    "chain": {"method": "shortgpt+wanda", "target": "0.34+0.5"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("faults") / "model")


@pytest.fixture(scope="module")
def text(model: Path) -> Path:
    return write_texts(model.parent / "text.jsonl")


@contextmanager
def failing_from(change: int) -> Iterator[list[int]]:
    """Make every change of the disk from the n-th on fail, as on a disk that has become full."""
    counted = [0]

    def hooked(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counted[0] += 1
            if counted[0] >= change:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patched:
        for name in WRITES:
            patched.setattr(os, name, hooked(getattr(os, name)))
        yield counted


def test_savers_of_other_libraries_are_one_line(model: Path, tmp_path: Path) -> None:
    """Check the errors of safetensors, which Python does not count among its own of files."""
    import torch
    from safetensors.torch import save_file

    def work() -> None:
        with writing(tmp_path):
            save_file({"x": torch.zeros(100_000)}, tmp_path / "x.safetensors")

    answer = refused_with_small_files(50_000, work, tmp_path / "answer.txt")
    assert answer.startswith(f"refused: cannot write {tmp_path}: ") and "File too large" in answer


@pytest.mark.parametrize("kind", RUNS)
def test_a_disk_that_becomes_full_keeps_what_is_done(kind: str, model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "straight").mkdir()
    with failing_from(2**30) as counted:
        niwaki.compress(model, tmp_path / "straight/out", **settings(text, **RUNS[kind]))
    for place, share in enumerate((0.02, 0.35, 0.7, 0.97)):
        (tmp_path / str(place)).mkdir()
        out = tmp_path / str(place) / "out"
        with failing_from(max(1, int(share * counted[0]))), pytest.raises(OutputError) as caught:
            niwaki.compress(model, out, **settings(text, **RUNS[kind]))
        assert "No space left" in str(caught.value) and "\n" not in str(caught.value)
        begun = any(out.parent.iterdir())
        niwaki.compress(model, out, resume=begun, **settings(text, **RUNS[kind]))
        assert file_bytes(out) == file_bytes(tmp_path / "straight/out")
        assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_disk_that_becomes_full_keeps_the_old_result(model: Path, text: Path, tmp_path: Path) -> None:
    niwaki.compress(model, tmp_path / "out", **settings(text))
    before = folder_bytes(tmp_path / "out")
    with failing_from(2**30) as counted:
        niwaki.export(model, tmp_path / "other", to="gguf", type="f16")
    for share in (0.1, 0.5, 0.8):
        with failing_from(int(share * counted[0])), pytest.raises(OutputError, match="No space left"):
            niwaki.export(model, tmp_path / "out", to="gguf", type="f16", overwrite=True)
        assert folder_bytes(tmp_path / "out") == before


def refused_with_small_files(limit: int, work: Callable[[], Any], answer: Path) -> str:
    """Run in a forked child whose files may have `limit` bytes; return its error if it is one of niwaki."""
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            work()
        except NiwakiError as error:
            answer.write_text(f"refused: {error}"[:limit])
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return answer.read_text() if answer.is_file() else "ended without an error of niwaki"


def test_files_that_cannot_grow_are_one_line(model: Path, text: Path, tmp_path: Path) -> None:
    """Check every writer against a limit of the size of a file: safetensors, the log and mapped files too."""
    disk = settings(text, activation_bytes=0, **RUNS["walk"])
    works: dict[str, tuple[int, Callable[[Path], Any]]] = {
        "shard": (50_000, lambda out: niwaki.compress(model, out, method="magnitude", target="0.5", device="cpu")),
        "log": (300, lambda out: niwaki.compress(model, out, method="magnitude", target="0.5", device="cpu")),
        "hidden states": (4_000, lambda out: niwaki.compress(model, out, **disk)),
        "gguf": (50_000, lambda out: niwaki.export(model, out, to="gguf")),
    }
    for name, (limit, work) in works.items():
        answer = refused_with_small_files(limit, lambda work=work: work(tmp_path / "out"), tmp_path / f"{name}.txt")
        assert answer.startswith("refused: cannot write"), f"{name}: {answer}"
        assert len(answer) >= limit or ("File too large" in answer and "\n" not in answer), f"{name}: {answer}"
        assert not (tmp_path / "out").exists()
        shutil.rmtree(tmp_path / "out.partial", ignore_errors=True)


def test_a_place_where_nothing_can_be_written_is_refused_before_the_work(
    model: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Path("/proc/out")  # where even root writes nothing
    for command in (
        ["compress", model, place, "--method", "magnitude", "--target", "0.5"],
        ["export", model, place, "--to", "gguf"],
        ["recover", model, place, "--data", text],
        ["rotate", model, place, "--target", "2:4", "--calibration", text],
        ["compare", model, model, "--data", text, "--report", place],
    ):
        code, _, error = run(capsys, *command)
        assert code == 2 and "cannot write to /proc" in error and len(error.strip().splitlines()) == 1


def test_one_run_at_a_time_holds_a_place(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with alone(out):
        for again in (
            lambda: niwaki.compress(model, out, **settings(text)),
            lambda: niwaki.compress(model, out, resume=True, overwrite=True, **settings(text)),
            lambda: niwaki.export(model, out, to="gguf", overwrite=True),
            lambda: compare(model, model, data=str(text), report=out),
            lambda: rotate(model, out, target="2:4", calibration=str(text)),
        ):
            with pytest.raises(OutputError, match="another niwaki is working on"):
                again()
    assert not list(tmp_path.iterdir())


def test_a_lock_ends_with_its_process_and_is_removed(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / ".out.lock").write_text("")  # of a process that was killed
    niwaki.compress(model, out, method="magnitude", target="0.5", device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_changes_of_one_result_come_one_after_another(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    niwaki.compress(model, out, method="magnitude", target="0.5", device="cpu")

    def write(place: Path) -> None:
        (place / "niwaki").mkdir()
        (place / "niwaki/note.json").write_text("{}")
        with pytest.raises(OutputError, match="another niwaki is working on"):
            replace_files(out, write)

    replace_files(out, write)
    assert (out / "niwaki/note.json").is_file() and check_weights(out)


def test_what_appears_at_out_during_a_run_is_not_replaced(model: Path, text: Path, tmp_path: Path) -> None:
    def report(event: str, **fields: Any) -> None:
        if event == "block" and not (tmp_path / "out").exists():
            (tmp_path / "out").mkdir()
            (tmp_path / "out/thesis.txt").write_text("years of work")

    with pytest.raises(OutputError, match="appeared during this run and is not replaced"):
        niwaki.compress(model, tmp_path / "out", report=report, **settings(text))
    assert folder_bytes(tmp_path / "out") == {"thesis.txt": b"years of work"}
    (tmp_path / "out").rename(tmp_path / "mine")
    niwaki.compress(model, tmp_path / "out", resume=True, **settings(text))
    assert check_weights(tmp_path / "out")
