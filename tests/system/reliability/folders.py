"""Tests 4, 5 and 8: weights that changed, headers that are wrong, and shards that are elsewhere."""

import json
import os
import random
import shutil
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

import niwaki as api
from niwaki.cli.demo import sapling
from niwaki.errors import CheckpointError, NiwakiError
from niwaki.serve.server import ServerSettings, make_service
from support.models import tiny_llama
from support.mutations import NUMBERS, OTHERS, WORDS, Mutation, mutate_bytes
from support.packed_folders import packed_folder, try_folder
from tests.system.reliability.commands import Row, forked, niwaki, waited

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLIPS, MUTANTS, LARGE = 100, 1000, 20
CHILD_OF = 50  # mutants that a child reads: a crash ends that child alone
HUGE = 100 * 10**6 + 1


def flipped() -> Row:
    """Run test 4: the sapling, pruned and packed, with one byte changed before the server reads it."""
    chosen, found, slowest = random.Random(0), Counter[str](), 0.0
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "out"
        given = ["--method", "magnitude", "--target", "2:4", "--pack", "auto", "--device", "cpu"]
        assert niwaki("compress", sapling(), out, *given).code == 0
        shards = sorted(out.rglob("*.safetensors"))
        for shard in shards:
            size = shard.stat().st_size
            for at in (0, size - 1, *(chosen.randrange(size) for _ in range(FLIPS - 2))):
                bit = 1 << chosen.randrange(8)
                _flip(shard, at, bit)
                began = time.perf_counter()
                found[_served(out, shard.name)] += 1
                slowest = max(slowest, time.perf_counter() - began)
                _flip(shard, at, bit)
        told = []
        for shard in shards:
            _flip(shard, shard.stat().st_size // 2, 1)
            ended = niwaki("serve", out, "--port", 0, "--device", "cpu")
            told.append(ended.code == 2 and shard.name in ended.err and "SHA-256" in ended.err)
            _flip(shard, shard.stat().st_size // 2, 1)
        make_service(out, ServerSettings(device="cpu")).close()
    total = found.total()
    return {
        "what": f"the packed sapling, {len(shards)} shards: one bit of one byte changed, then the start of the server; "
        "`niwaki serve` itself once for each shard",
        "reached": f"{found['detected']:,} of {total:,} detected ({len(shards)} shards × {FLIPS}), `niwaki serve` "
        f"ended with exit code 2 in {sum(told)} of {len(told)}; at most {slowest:.2f} s",
        "figure": {"shards": len(shards), "outcomes": dict(found), "serve_refused": sum(told),
                   "slowest_s": round(slowest, 3)},
        "passed": found["detected"] == total == FLIPS * len(shards) and all(told),
    }  # fmt: skip


def _flip(path: Path, at: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ bit]))


def _served(out: Path, shard: str) -> str:
    """Start a server on `out` and return what became of it."""
    try:
        make_service(out, ServerSettings(device="cpu")).close()
    except CheckpointError as error:
        return "detected" if shard in str(error) and "SHA-256" in str(error) else f"other: {error}"[:200]
    return "served"


def mutants() -> Row:
    """Run test 5: mutants of the file of a packed model, each loaded whole in a child."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder, told = Path(temporary) / "m", Path(temporary) / "told"
        shutil.copytree(packed_folder(), folder)
        made = list(_mutants((folder / WEIGHTS).read_bytes()))
        for first in range(0, len(made), CHILD_OF):
            own = made[first : first + CHILD_OF]
            told.write_text("")
            code = waited(forked(lambda own=own: _load_each(folder, own, told)))  # type: ignore[misc]
            found = [json.loads(line) for line in told.read_text().splitlines()]
            rows += found
            if code:
                rows.append(
                    {
                        "kind": own[min(len(found), len(own) - 1)][0],
                        "was": f"crashed with {code}",
                        "s": 0.0,
                        "cpu_s": 0.0,
                    }
                )
    outcomes = Counter(row["was"] for row in rows)
    refused = [row["s"] for row in rows if row["was"] == "refused"]
    used = max(row["cpu_s"] for row in rows if row["was"] == "refused")  # other work shares the machine
    crashed = [row for row in rows if row["was"] not in ("refused", "read as its bytes say")]
    return {
        "what": f"mutants of a packed model's file: headers, offsets, lengths, ends, and {LARGE} headers of 100 MB and "
        "more; each loaded whole",
        "reached": f"{len(rows):,} mutants: {len(crashed)} crashes, {outcomes['refused']} refused within "
        f"{max(refused):.2f} s ({used:.2f} s of CPU), {outcomes['read as its bytes say']} harmless and read as their "
        "bytes say",
        "figure": {"mutants": len(rows), "kinds": dict(Counter(row["kind"] for row in rows)),
                   "outcomes": dict(outcomes), "slowest_refusal_s": round(max(refused), 3),
                   "slowest_refusal_cpu_s": used,
                    "crashes": crashed[:10]},
        "passed": len(rows) >= MUTANTS and not crashed and used <= 1,
    }  # fmt: skip


def _mutants(file: bytes) -> Iterator[tuple[str, bytes | int]]:
    """Yield kinds and contents; a number stands for a file with a header of that length."""
    chosen, length = random.Random(0), int.from_bytes(file[:8], "little")
    for _ in range(150):
        yield "truncated", file[: chosen.randrange(len(file))]
    header = json.loads(file[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    for number in range(200):
        changed = json.loads(json.dumps(header))
        one, other = chosen.sample(names, 2)
        begin, end = changed[other]["data_offsets"]
        if number % 2:
            changed[one]["data_offsets"] = [begin, end]
        else:
            shift = chosen.choice([-64, -8, -1, 1, 8, 64])
            changed[one]["data_offsets"] = [value + shift for value in changed[one]["data_offsets"]]
        text = json.dumps(changed).encode()
        yield "overlapping", struct.pack("<Q", len(text)) + text + file[8 + length :]
    for number in range(LARGE):
        yield "header of 100 MB", HUGE + number * 10**6
    for _ in range(MUTANTS - 370):
        value = chosen.choice([*NUMBERS, *WORDS, *OTHERS])
        yield "structure", mutate_bytes(file, Mutation(chosen.getrandbits(32), chosen.getrandbits(32), value))


def _load_each(folder: Path, own: list[tuple[str, bytes | int]], told: Path) -> None:
    """Load each mutant and append one line for it."""
    for kind, content in own:
        with (folder / WEIGHTS).open("wb") as file:
            if isinstance(content, int):
                file.write(struct.pack("<Q", content) + b'{"a":"' + b"x" * (content - 8) + b'"}')
            else:
                file.write(content)
        began, used = time.perf_counter(), time.process_time()
        was = "read as its bytes say"
        try:
            api.load(folder, device="cpu")
        except NiwakiError as error:
            was = "refused" if "\n" not in str(error) else "refused in several lines"
        seconds, used = time.perf_counter() - began, time.process_time() - used
        if was == "read as its bytes say":
            try_folder(folder)
        with told.open("a") as lines:
            lines.write(json.dumps({"kind": kind, "was": was, "s": round(seconds, 4), "cpu_s": round(used, 4)}) + "\n")


def outside() -> Row:
    """Run test 8: shards and files beside them that lead out of the folder, with the reads counted by the disk."""
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tiny_llama(folder / "plain")
        secret = folder / "secret"
        secret.mkdir()
        for name, lead in _leads().items():
            model = folder / "model"
            shutil.rmtree(model, ignore_errors=True)
            shutil.copytree(folder / "plain", model)
            for path in (folder / "plain").iterdir():
                shutil.copy(path, secret / path.name)
            lead(model, secret)
            found[name] = {command: _read_outside(secret, arguments(model, folder)) for command, arguments in
                           _readers().items()}  # fmt: skip
        control = _seen_reading(secret)
    tries = [one for kind in found.values() for one in kind.values()]
    reads = sum(len(one["read"]) for one in tries)
    refused = sum(one["code"] == 2 for one in tries)
    return {
        "what": f"{len(found)} ways out of the folder, {len(_readers())} commands each; the access times of the files "
        "outside tell whether they were read",
        "reached": f"{len(tries)} tries: {reads} reads outside, {refused} refused with exit code 2"
        + ("" if control else "; but the disk keeps no access times"),
        "figure": {"ways": found, "a_read_is_seen": control},
        "passed": control and not reads and refused == len(tries),
    }


def _leads() -> dict[str, Callable[[Path, Path], None]]:
    """Return the ways out of a folder, as functions of it and of the folder outside."""

    def indexed(name: Callable[[Path], str]) -> Callable[[Path, Path], None]:
        def lead(model: Path, secret: Path) -> None:
            tensors = load_file(model / WEIGHTS)
            (model / WEIGHTS).unlink()
            where = dict.fromkeys(tensors, name(secret / WEIGHTS))
            (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))

        return lead

    def linked(name: str, relative: bool = False) -> Callable[[Path, Path], None]:
        def lead(model: Path, secret: Path) -> None:
            (model / name).unlink()
            (model / name).symlink_to(f"../secret/{name}" if relative else secret / name)

        return lead

    def linked_shard(model: Path, secret: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        names = sorted(tensors)
        (model / WEIGHTS).unlink()
        save_file({name: tensors[name] for name in names[1:]}, model / "a.safetensors", metadata={"format": "pt"})
        save_file({names[0]: tensors[names[0]]}, secret / "b.safetensors", metadata={"format": "pt"})
        (model / "b.safetensors").symlink_to(secret / "b.safetensors")
        where = {name: "b.safetensors" if name == names[0] else "a.safetensors" for name in names}
        (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))

    return {
        "link of the weights": linked(WEIGHTS), "relative link of the weights": linked(WEIGHTS, relative=True),
        "link of one shard": linked_shard, "link of the tokenizer": linked("tokenizer.json"),
        "link of the config": linked("config.json"),
        "../ in the index": indexed(lambda path: f"../secret/{path.name}"),
        "a/../../ in the index": indexed(lambda path: f"a/../../secret/{path.name}"),
        "absolute path in the index": indexed(str), "file: address in the index": indexed(lambda path: f"file://{path}"),
    }  # fmt: skip


def _readers() -> dict[str, Callable[[Path, Path], list[object]]]:
    return {
        "inspect": lambda model, _: ["inspect", model],
        "generate": lambda model, _: ["generate", model, "a", "--max-new-tokens", 1, "--device", "cpu"],
        "compress": lambda model, folder: [
            "compress", model, folder / "out", "--method", "magnitude", "--target", "0.5", "--device", "cpu",
        ],
        "export": lambda model, folder: ["export", model, folder / "out", "--to", "gguf"],
        "serve": lambda model, _: ["serve", model, "--port", 0, "--device", "cpu"],
    }  # fmt: skip


def _read_outside(secret: Path, arguments: list[object]) -> dict[str, Any]:
    _forget(secret)
    ended = niwaki(*arguments)
    return {"code": ended.code, "read": _read(secret), "said": ended.last[-140:]}


def _forget(secret: Path) -> None:
    """Set the access times to long ago, so that the next read moves them."""
    for path in secret.iterdir():
        os.utime(path, (0, path.stat().st_mtime))


def _read(secret: Path) -> list[str]:
    return sorted(path.name for path in secret.iterdir() if path.stat().st_atime > 0)


def _seen_reading(secret: Path) -> bool:
    """Return whether a read by safetensors is seen."""
    _forget(secret)
    load_file(secret / WEIGHTS)
    return _read(secret) == [WEIGHTS]
