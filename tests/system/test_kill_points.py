"""Killed runs of every kind, at a few writes each, and every state of the folders that a kill can leave."""

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import niwaki
from niwaki.compression.places import check_free
from niwaki.errors import OutputError, ResumeError
from support.models import file_bytes, run, tiny_llama
from system.kill_kinds import KINDS, World, make_world
from system.kill_points import Bench, Moment

# All kinds, at every write and at many moments, are for `python -m tests.system.kill_points`.
QUICK = ("walk", "rtn without text", "chain", "shadow", "overwrite", "export gguf", "adapt")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TOKENIZERS_PARALLELISM", "false")
        patched.setenv("NIWAKI_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield make_world(tmp_path_factory.mktemp("kills"), whole=False)


@pytest.mark.parametrize("name", QUICK)
def test_a_killed_run_ends_at_the_same_bytes(name: str, world: World, tmp_path: Path) -> None:
    bench = Bench.of(world, name, tmp_path / "runs")
    assert bench.changes > 8, "the hook counts"
    moments: list[Moment] = [("change", bench.changes // 2)]
    if name == "chain":
        moments += [("change", bench.changes - 1), ("clock", 0.6 * bench.seconds)]
    for moment in moments:
        assert bench.kill(moment)["redone"] <= 1


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, world: World) -> dict[str, Path]:
    """Return folders as kills leave them: finished results, working folders of both stages, remains of a removal."""
    folder = tmp_path_factory.mktemp("parts")
    chain, found = KINDS["chain"].run, {}
    for name, stage, block in (("partial", "out.partial", 1), ("stage", "out.shaped.partial", 1)):
        place = folder / name
        place.mkdir()
        method = "gptq" if name == "partial" else "comp"
        with pytest.raises(KeyboardInterrupt):
            _stopped(chain, world, place / "out", method, block)
        found[name] = place / stage
        if name == "partial":
            found["shaped"] = place / "out.shaped"
    (folder / "whole").mkdir()
    chain(world, folder / "whole/out", False)
    found["out"] = folder / "whole/out"
    return found


def _stopped(chain: Any, world: World, out: Path, method: str, block: int) -> None:
    from niwaki.compression import walk

    real = walk._compress_block

    def stopping(at: Any, plan: Any, *rest: Any) -> Any:
        if plan.steps[0].name == method and at.index == block and plan.records:
            raise KeyboardInterrupt
        return real(at, plan, *rest)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(walk, "_compress_block", stopping)
        chain(world, out, False)


STATES = [
    frozenset(chosen)
    for size in range(4)
    for chosen in itertools.combinations(("out", "partial", "shaped", "stage", "replaced", "rests"), size)
]


@pytest.mark.parametrize("state", STATES, ids=lambda state: "+".join(sorted(state)) or "nothing")
def test_every_state_goes_on_or_names_a_step_that_works(
    state: frozenset[str], parts: dict[str, Path], tmp_path: Path
) -> None:
    """The refusals of OUT alone: the step that each one names is not refused again."""
    out = tmp_path / "out"
    places = {"out": "out", "partial": "out.partial", "shaped": "out.shaped", "stage": "out.shaped.partial"}
    for name in state - {"replaced", "rests"}:
        shutil.copytree(parts[name], tmp_path / places[name], copy_function=os.link)
    if "replaced" in state:
        shutil.copytree(parts["out"], tmp_path / "out.replaced", copy_function=os.link)
    if "rests" in state:
        (tmp_path / "out.shaped.replaced/niwaki").mkdir(parents=True)
    for flags in ({}, {"resume": True}, {"overwrite": True}, {"resume": True, "overwrite": True}):
        given = {"resume": False, "overwrite": False, **flags}
        try:
            check_free(out, **given)
        except (OutputError, ResumeError) as error:
            text = str(error)
            assert "\n" not in text and not (given["overwrite"] and "Start without --resume" not in text)
            if "continue it with --resume" in text:
                check_free(out, resume=True, overwrite=False)
            if "add --resume" in text:
                check_free(out, resume=True, overwrite=True)
            if "Start without --resume" in text:
                check_free(out, resume=False, overwrite=False)
            check_free(out, resume=False, overwrite=True)


@pytest.mark.parametrize("state", ["stage", "shaped", "partial+shaped", "out", "out+shaped", "out+partial+shaped"])
def test_a_chain_goes_on_from_every_state_that_a_kill_leaves(
    state: str, parts: dict[str, Path], world: World, tmp_path: Path
) -> None:
    places = {"out": "out", "partial": "out.partial", "shaped": "out.shaped", "stage": "out.shaped.partial"}
    for name in state.split("+"):
        shutil.copytree(parts[name], tmp_path / places[name])
    if state == "out+partial+shaped":
        with pytest.raises(OutputError, match="add --resume to finish the run that was to replace it"):
            KINDS["chain"].run(world, tmp_path / "out", True)
        return
    KINDS["chain"].run(world, tmp_path / "out", True)
    assert file_bytes(tmp_path / "out") == file_bytes(parts["out"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_second_stage_without_its_first_is_refused_before_the_work(
    parts: dict[str, Path], world: World, tmp_path: Path
) -> None:
    shutil.copytree(parts["partial"], tmp_path / "out.partial")
    with pytest.raises(ResumeError, match=r"goes on from .*out\.shaped, which does not exist"):
        KINDS["chain"].run(world, tmp_path / "out", True)
    shutil.rmtree(tmp_path / "out.partial")
    shutil.copytree(parts["shaped"], tmp_path / "out.shaped")
    with pytest.raises(ResumeError, match="is the first stage of another recipe"):
        KINDS["walk"].run(world, tmp_path / "out", True)


def test_links_and_missing_folders_are_one_line_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_llama(tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    cases = [("link", "which does not exist"), ("no/out", "create it"), ("file/out", "is not a folder"),
             ("o" * 250, "folder name of 1 to")]  # fmt: skip
    for place, message in cases:
        for more in ([], ["--merge-adapter"]):
            code, _, error = run(
                capsys, "compress", model, tmp_path / place, "--method", "rtn", "--target", "4bit", *more
            )
            assert code == 2 and message in " ".join(error.split()) and "Traceback" not in error
        for call in (niwaki.export,):
            with pytest.raises(OutputError, match=message):
                call(model, tmp_path / place, to="gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "model"]


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    (tmp_path / "disk/out").mkdir(parents=True)
    (tmp_path / "out").symlink_to(tmp_path / "disk/out")
    niwaki.compress(model, tmp_path / "out", method="magnitude", target="2:4", device="cpu")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/out/niwaki/run.json").is_file()
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]
    with pytest.raises(OutputError, match="already exists"):
        niwaki.compress(model, tmp_path / "out", method="magnitude", target="2:4", device="cpu")
