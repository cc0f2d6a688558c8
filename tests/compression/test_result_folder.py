"""Output folders: which are refused, which are replaced, and that only one run works in a folder."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import niwaki
from niwaki.errors import OutputError
from support.compressions import folder_bytes, settings
from support.models import file_bytes


def test_existing_out_is_refused_and_replaced_only_at_the_end(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    niwaki.compress(model, out, **settings(text))
    before = file_bytes(out)
    with pytest.raises(OutputError, match="already exists"):
        niwaki.compress(model, out, **settings(text, seed=1))
    bad = dict(settings(text, target="0.5"))
    with pytest.raises(KeyboardInterrupt):

        def stop(event: str, **fields: Any) -> None:
            if event == "block" and fields["index"] == 2:
                raise KeyboardInterrupt

        niwaki.compress(model, out, overwrite=True, report=stop, **bad)
    assert file_bytes(out) == before
    niwaki.compress(model, out, overwrite=True, **bad)
    assert file_bytes(out) != before
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out"]


def test_disk_that_cannot_hold_the_result_is_refused_first(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("niwaki.compression.result_folder.shutil.disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(OutputError, match="the result needs"):
        niwaki.compress(model, tmp_path / "out", **settings(text))
    assert not list(tmp_path.glob("out*"))


def test_two_runs_do_not_share_a_folder(model: Path, text: Path, tmp_path: Path) -> None:
    def again(event: str, **fields: Any) -> None:
        if event == "block":
            with pytest.raises(OutputError, match="another niwaki is working"):
                niwaki.compress(model, tmp_path / "out", resume=True, **settings(text))

    niwaki.compress(model, tmp_path / "out", report=again, **settings(text))


@pytest.mark.parametrize("place", ["model", "model/inside", ".", "link"])
def test_an_out_that_shares_a_folder_with_the_model_is_refused(
    model: Path, text: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "link").symlink_to(model)
    (model / "niwaki").mkdir()
    (model / "niwaki/run.json").write_text("{}")  # the model is itself a result, so it could be replaced
    before = folder_bytes(tmp_path)
    with pytest.raises(OutputError, match=r"share a folder|not a niwaki result"):
        niwaki.compress(model, tmp_path / place, overwrite=True, **settings(text))
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize("suffix", [".partial", ".replaced"])
def test_a_model_that_is_named_like_a_working_folder_is_refused(
    model: Path, text: Path, tmp_path: Path, suffix: str
) -> None:
    source = model.rename(tmp_path / f"out{suffix}")
    (source / "niwaki").mkdir()
    (source / "niwaki/run.json").write_text("{}")
    before = folder_bytes(tmp_path)
    with pytest.raises(OutputError, match="share a folder"):
        niwaki.compress(source, tmp_path / "out", overwrite=True, **settings(text))
    assert folder_bytes(tmp_path) == before


@pytest.mark.parametrize("suffix", ["", ".partial", ".replaced"])
def test_only_what_niwaki_wrote_is_overwritten(model: Path, text: Path, tmp_path: Path, suffix: str) -> None:
    mine = tmp_path / f"out{suffix}"
    mine.mkdir()
    niwaki.compress(model, tmp_path / "out", **settings(text))  # an empty folder is nobody's
    shutil.rmtree(tmp_path / "out")
    mine.mkdir(exist_ok=True)
    (mine / "thesis.txt").write_text("years of work")
    for changes in ({"overwrite": True}, {"resume": True}, {}):
        with pytest.raises(OutputError, match=rf"out{suffix} exists and is not a niwaki result"):
            niwaki.compress(model, tmp_path / "out", **changes, **settings(text))
    assert folder_bytes(mine) == {"thesis.txt": b"years of work"}


def test_overwrite_does_not_delete_a_running_run(model: Path, text: Path, tmp_path: Path) -> None:
    def again(event: str, **fields: Any) -> None:
        if event == "block":
            with pytest.raises(OutputError, match="another niwaki is working"):
                niwaki.compress(model, tmp_path / "out", overwrite=True, **settings(text))

    niwaki.compress(model, tmp_path / "out", report=again, **settings(text))


def test_read_only_parent_is_refused(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("niwaki.compression.result_folder.Path.mkdir", refuse)
    with pytest.raises(OutputError, match=r"cannot write to .*Permission denied"):
        niwaki.compress(model, tmp_path / "out", **settings(text))


def test_out_below_a_missing_folder_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist: create it"):
        niwaki.compress(model, tmp_path / "no/such/out", **settings(text))
