"""Process in which Triton interprets its kernels, for functions of tests without a GPU.

Triton chooses between interpreter and compiler at its import, so that needs a process of its own. One process serves
all tests. It imports torch and Triton once (some seconds) and forks for every function, whose changes to modules end
with the fork.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
from functools import cache
from pathlib import Path
from types import FunctionType

import niwaki

TESTS = Path(__file__).parents[1]


@cache
def _server() -> subprocess.Popen[str]:
    source = Path(niwaki.__file__).parents[1]
    paths = os.pathsep.join(str(path) for path in (source, TESTS, TESTS.parent))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.Popen(
        [sys.executable, "-c", "from support.triton_interpreter import serve; serve()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip


def interpreted(name: str, module: str) -> None:
    """Run a function of a test file, and fail with its traceback."""
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(f"{module} {name}\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, f"the interpreting process ended ({server.poll()})"
    assert json.loads(answer) == "done", json.loads(answer)


def serve() -> None:
    """Answer every line `MODULE FUNCTION` with "done" or a traceback until the input ends."""
    import triton  # noqa: F401 (the forks inherit it)

    import niwaki.runtime.linear  # noqa: F401

    patch_once()
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            with os.fdopen(writing, "w") as answer:
                answer.write(_run(*line.split()))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as answer:
            result = answer.read()
        ended = os.waitpid(child, 0)[1]
        print(json.dumps(result or f"{line.strip()} ended with status {ended}"), flush=True)


def _run(module: str, name: str) -> str:
    try:
        getattr(importlib.import_module(module), name)()
    except BaseException:
        return traceback.format_exc()
    return "done"


def patch_once() -> None:
    """Patch Triton's language once per launch, and not again in every function that a kernel calls.

    For every such call the interpreter searches all members of its modules and replaces nothing. That was 44% of a
    profiled launch of `triton.rows` (Triton 3.9.0).
    """
    from triton import language
    from triton.runtime import interpreter

    real, done = interpreter._patch_lang, set()

    def patch(fn: FunctionType) -> interpreter._LangPatchScope:
        values = fn.__globals__.values()
        languages = tuple(any(value is module for value in values) for module in (language, language.core))
        if languages in done:
            return interpreter._LangPatchScope()  # nothing to undo
        first = not done
        scope = real(fn)
        done.add(languages)
        if first:  # the launch, which restores the language at its end
            restore = scope.restore

            def ended() -> None:
                restore()
                done.clear()

            scope.restore = ended
        return scope

    interpreter._patch_lang = patch
