"""Tests 1, 2 and 3: runs that are killed, resumed from other inputs, or out of a disk to write on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import load_file, save_file

from support.compressions import folder_bytes
from support.models import file_bytes, tiny_llama, write_texts
from tests.system.reliability.commands import Ended, Row, begin, niwaki, waited

ROOT = Path(__file__).parents[3]
MEASURED = ROOT / "benchmarks/results/speed/kill-points-cpu.json"
METHOD = ["--method", "sparsegpt", "--target", "2:4"]
OTHER_USER = 65534


def killed(moments: int = 20) -> Row:
    """Run test 1, from the result of `tests.system.kill_points` where there is one."""
    found = json.loads((MEASURED if MEASURED.is_file() else _killed(moments)).read_text(encoding="utf-8"))["kinds"]
    redone = max(one["blocks_redone_max"] for one in found.values())
    failures = [failure for one in found.values() for failure in one["failures"]]
    points = sum(one["killed_at_changes"] + one["killed_by_the_clock"] for one in found.values())
    least = min(one["moments"] for one in found.values())
    return {
        "what": "SIGKILL at random moments and before every change of the disk, then --resume or a repetition",
        "reached": f"{points:,} kills in {len(found)} kinds of runs, at least {least} at random moments each: "
        f"{len(failures)} with other bytes, at most {redone} block compressed again",
        "figure": {"kills": points, "kinds": list(found), "blocks_redone_max": redone, "failures": failures[:10]},
        "passed": not failures and redone <= 1 and least >= moments,
    }


def _killed(moments: int) -> Path:
    """Repeat one kind of run, killed at every change of the disk and at random moments; return its counts."""
    out = Path(tempfile.mkdtemp()) / "killed.json"
    command = [sys.executable, "-m", "tests.system.kill_points", "--kind", "walk", "--moments", str(moments)]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    subprocess.run([*command, "--out", str(out)], check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": path})
    return out


def _compression(model: Path, out: Path, text: Path, *more: object) -> list[object]:
    size = ["--calibration", text, "--samples", 6, "--seq-len", 16, "--device", "cpu"]
    return ["compress", model, out, *METHOD, *size, *more]


def resumed_from_others() -> Row:
    """Run test 2: a killed run is resumed with one thing changed."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model, text = tiny_llama(folder / "model", blocks=12), write_texts(folder / "text.jsonl")
        straight, out, kept = folder / "straight", folder / "out", folder / "kept"
        assert niwaki(*_compression(model, straight, text)).code == 0
        child = begin(*_compression(model, out, text))
        while len(list(folder.glob("out.partial/niwaki/journal/block-*.json"))) < 2:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        waited(child)
        shutil.copytree(folder / "out.partial", kept)
        found = {}
        for name, change in _changes(model, text).items():
            with _restored(model, text):
                more = change()
                ended = niwaki(*_compression(model, out, text, "--resume", *more))
            same = out.with_name("out.partial").is_dir() and folder_bytes(kept) == folder_bytes(folder / "out.partial")
            found[name] = {"code": ended.code, "said": ended.last[-160:], "kept": same, "out": out.exists()}
            if not same:
                shutil.rmtree(out, ignore_errors=True)
                shutil.rmtree(folder / "out.partial", ignore_errors=True)
                shutil.copytree(kept, folder / "out.partial")
        control = niwaki(*_compression(model, out, text, "--resume"))
        same = control.code == 0 and file_bytes(out) == file_bytes(straight)
    refused = [one["code"] == 2 and one["kept"] and not one["out"] for one in found.values()]
    return {
        "what": "a killed run of 12 blocks, resumed by the command line with one input changed",
        "reached": f"{sum(refused)} of {len(found)} changes refused with exit code 2 and what was done kept; "
        f"unchanged it ends at {'the same' if same else 'OTHER'} bytes",
        "figure": {"changes": found, "unchanged_same_bytes": same},
        "passed": all(refused) and same,
    }


def _changes(model: Path, text: Path) -> dict[str, Callable[[], list[object]]]:
    """Return what may change, each as a function that changes it and returns more options."""

    def weights() -> list[object]:
        tensors = load_file(model / "model.safetensors")
        tensors["model.layers.7.mlp.up_proj.weight"][3, 4] += 1
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
        return []

    def field(name: str, **values: Any) -> list[object]:
        path = model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return []

    def data() -> list[object]:
        write_texts(text, first=5)
        return []

    options: dict[str, list[object]] = {
        "--method wanda": ["--method", "wanda"], "--target 0.5": ["--target", "0.5"], "--seed 1": ["--seed", 1],
        "--samples 5": ["--samples", 5], "--seq-len 12": ["--seq-len", 12], "--dtype bfloat16": ["--dtype", "bfloat16"],
        "--set damping_frac=0.1": ["--set", "damping_frac=0.1"], "--pack auto": ["--pack", "auto"],
        "--embeddings 8bit": ["--embeddings", "8bit"], "--allocation owl": ["--target", "0.5", "--allocation", "owl"],
        "--bos on": ["--bos", "on"], "--batch-tokens 32": ["--batch-tokens", 32], "--dense-stream": ["--dense-stream"],
    }  # fmt: skip
    return {
        "weights": weights, "text": data, "config.json": lambda: field("config.json", rms_norm_eps=1e-3),
        "tokenizer_config.json": lambda: field("tokenizer_config.json", model_max_length=7),
        "generation_config.json": lambda: field("generation_config.json", temperature=0.5, do_sample=True),
        **{name: (lambda given=given: list(given)) for name, given in options.items()},
    }  # fmt: skip


@contextmanager
def _restored(model: Path, text: Path) -> Iterator[None]:
    """Put the files back that a change replaced."""
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (text, *model.iterdir())}
    try:
        yield
    finally:
        for path, (content, when) in before.items():
            path.write_bytes(content)
            os.utime(path, ns=(when, when))  # a resume takes a shard with another time for a changed one


@contextmanager
def _disk(folder: Path, size: int) -> Iterator[Path]:
    """Make a file system of `size` bytes, which needs the rights of root."""
    place = folder / "disk"
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _remount(place: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)


def _blind() -> None:
    """Make the disk seem empty, as if another program filled it after the check."""
    shutil.disk_usage = lambda _: SimpleNamespace(total=10**15, used=0, free=10**15)  # type: ignore[assignment]


def full_or_read_only(sizes: int = 10) -> Row:
    """Run test 3: every kind of command on a disk that is too small by some share, is read-only, or is another's."""
    if os.geteuid():
        return {"what": "disks of their own", "reached": "not run", "figure": {}, "passed": False,
                "not_run": "mounting a small disk needs the rights of root"}  # fmt: skip
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, command in _commands(folder).items():
            found[name] = _on_bad_disks(folder, command, sizes)
    tries = [one for kind in found.values() for one in kind["tries"]]
    bad = [one for one in tries if not one["as_wanted"]]
    intact = sum(one["earlier_intact"] for one in tries)
    return {
        "what": f"{len(found)} commands on a full disk ({sizes} sizes, past the check of space), a read-only one, "
        "a folder of another user; beside an earlier output, and over one where --overwrite exists",
        "reached": f"{len(tries)} tries: {len(tries) - len(bad)} with one clear line, {intact} earlier outputs intact, "
        f"{sum(len(one['left']) for one in tries)} partial files; "
        f"{sum(one.get('resumed_same_bytes', False) for one in tries)} resumed to the same bytes",
        "figure": {"commands": {name: {"bytes": kind["bytes"], "tries": len(kind["tries"])} for name, kind in
                                found.items()}, "failures": bad[:20],
                   "said": sorted({one["said"] for one in tries})[:8]},
        "passed": not bad,
    }  # fmt: skip


def _commands(folder: Path) -> dict[str, Callable[[Path], list[object]]]:
    """Return the commands that write, each from its OUT, and make what they read."""
    model, text = tiny_llama(folder / "model", blocks=6), write_texts(folder / "text.jsonl")
    pruned, coded = folder / "pruned", folder / "coded"
    assert niwaki(*_compression(model, pruned, text)).code == 0
    codes = ["--method", "rtn", "--target", "4bit", "--set", "group=16"]
    assert niwaki("compress", model, coded, *codes, "--device", "cpu").code == 0
    small = ["--samples", 8, "--seq-len", 16, "--steps", 2, "--device", "cpu", "--overwrite"]
    read = ["--data", text, "--seq-len", 16, "--max-tokens", 64, "--device", "cpu"]
    return {
        "compress": lambda out: _compression(model, out, text, "--overwrite"),
        "compress, hidden states on disk": lambda out: _compression(
            model, out, text, "--overwrite", "--activation-bytes", 0
        ),
        "export gguf": lambda out: ["export", pruned, out, "--to", "gguf", "--overwrite"],
        "export compressed-tensors": lambda out: ["export", coded, out, "--to", "compressed-tensors", "--overwrite"],
        "recover": lambda out: ["recover", pruned, out, "--data", text, *small],
        "compare": lambda out: ["compare", model, pruned, *read, "--rounds", 0, "--report", out, "--overwrite"],
    }


def _on_bad_disks(folder: Path, command: Callable[[Path], list[object]], sizes: int) -> dict[str, Any]:
    earlier = folder / "earlier"
    shutil.rmtree(earlier, ignore_errors=True)
    ended = niwaki(*command(earlier))
    assert ended.code == 0, ended.err
    whole = sum(path.stat().st_size for path in earlier.rglob("*") if path.is_file())
    tries = []
    for share in ((number + 0.5) / sizes for number in range(sizes)):
        for over in (False, True):
            with _disk(folder, 64 * 2**20) as disk:
                tries.append(_one(disk, earlier, command, over, partial(_fill, disk, int(share * whole)), share))
    for over in (False, True):
        with _disk(folder, 64 * 2**20) as disk:
            tries.append(_one(disk, earlier, command, over, partial(_remount, disk, "ro"), "read-only"))
        with _disk(folder, 64 * 2**20) as disk:
            disk.chmod(0o755)
            tries.append(_one(disk, earlier, command, over, None, "another user's", lambda: os.setuid(OTHER_USER)))
    return {"bytes": whole, "tries": tries}


def _fill(disk: Path, left: int) -> None:
    """Leave `left` bytes free."""
    free = os.statvfs(disk)
    with (disk / "ballast").open("wb") as file:
        file.write(bytes(max(free.f_bavail * free.f_frsize - left, 0)))


def _one(
    disk: Path, earlier: Path, command: Callable[[Path], list[object]], over: bool,
    spoil: Callable[[], object] | None, how: float | str, child: Callable[[], object] = lambda: None,
) -> dict[str, Any]:  # fmt: skip
    """Run one command on a spoiled disk; `over`: its OUT holds an earlier output already."""
    out, beside = disk / "out", disk / "beside"
    shutil.copytree(earlier, beside)
    if over:
        shutil.copytree(earlier, out)
    before = folder_bytes(disk)
    if spoil is not None:
        spoil()

    def prepare() -> None:
        _blind()
        child()

    arguments = command(out)
    ended = niwaki(*arguments, before=prepare)
    after = {name: content for name, content in folder_bytes(disk).items() if name != "ballast"}
    intact = all(after.get(name) == content for name, content in before.items())
    left = sorted(name for name in after if name not in before and not name.startswith("out.partial/"))
    left += [name for name in after if name.startswith("out.partial/") and ".tmp" in name]
    row = {"disk": how, "over": over, "code": ended.code, "said": _said(ended), "earlier_intact": intact, "left": left}
    clear = ended.code == 2 and "Traceback" not in ended.err and _told(ended)
    row["as_wanted"] = clear and intact and not left
    if isinstance(how, float) and arguments[0] == "compress" and not over and (disk / "out.partial").is_dir():
        (disk / "ballast").unlink()
        resume = [one for one in arguments if one != "--overwrite"]
        again = niwaki(*resume, "--resume")
        row["resumed_same_bytes"] = again.code == 0 and file_bytes(out) == file_bytes(earlier)
        row["as_wanted"] &= row["resumed_same_bytes"]
    return row


def _told(ended: Ended) -> bool:
    text = ended.err.lower()
    return any(reason in text for reason in ("no space left", "read-only", "permission denied"))


def _said(ended: Ended) -> str:
    return ended.last[-160:]
