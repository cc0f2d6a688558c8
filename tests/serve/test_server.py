"""From the command line to SIGTERM."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

import niwaki
from niwaki.errors import InputError
from niwaki.serve.engine import MAX_FAILURES
from niwaki.serve.event_queue import Timeouts
from niwaki.serve.server import ServerSettings, check
from support.models import run, tiny_llama
from support.servers import chat_model, running, until

STARTER = """
import logging, sys, time
from niwaki.serve import engine
from niwaki.serve.server import Server, ServerSettings, make_service
logging.basicConfig(level=logging.INFO)
engine.STALLED_S = float(sys.argv[3])
settings = ServerSettings(port=0, name="tiny", device="cpu", drain_s=float(sys.argv[2]))
service = make_service(sys.argv[1], settings)
service.engine.model.register_forward_pre_hook(lambda *_: time.sleep(0.03))
server = Server(service, settings)
server.run()
sys.exit(server.exit_code)
"""


def started(tmp_path: Path, stalled_s: float = 120) -> tuple[subprocess.Popen[str], str]:
    tiny_llama(tmp_path / "model", max_position_embeddings=256, eos_token_id=4095)
    process = subprocess.Popen(
        [sys.executable, "-c", STARTER, tmp_path / "model", "20", str(stalled_s)], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    url = next(line for line in process.stderr if "running on" in line).split("running on ")[1].split()[0]
    threading.Thread(target=process.stderr.read, daemon=True).start()
    return process, url


def test_a_process_that_was_stopped_for_longer_than_a_step_may_take_goes_on(tmp_path: Path) -> None:
    process, url = started(tmp_path, stalled_s=2)
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    stream = client.completions.create(model="tiny", prompt="Hello", max_tokens=20, temperature=0, stream=True)
    next(stream)
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    assert list(stream)[-1].choices[0].finish_reason == "length"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=20) == 0


def test_sigterm_answers_what_runs_and_takes_nothing_new(tmp_path: Path) -> None:
    process, url = started(tmp_path)
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    given: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 40, "temperature": 0}
    with httpx.Client(base_url=url) as http:
        assert http.get("/ready").status_code == 200
        stream = client.completions.create(**given, stream=True)
        pieces = [next(stream)]
        process.send_signal(signal.SIGTERM)
        until(lambda: http.get("/ready").status_code == 503, seconds=1)
        assert http.get("/health").status_code == 200
        refused = http.post("/v1/completions", json=given)
        assert refused.status_code == 503 and "Retry-After" in refused.headers
    pieces += list(stream)
    assert pieces[-1].choices[0].finish_reason == "length", "the answer under way was cut off"
    assert process.wait(timeout=20) == 0


def test_what_is_not_done_when_time_is_up_is_told_so(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", max_position_embeddings=256, eos_token_id=4095)
    with running(model, drain_s=0.3) as served:
        served.service.engine.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
        asked: Any = {"model": "tiny", "prompt": "Hello", "max_tokens": 200, "temperature": 0}
        stream = served.client().completions.create(**asked, stream=True)
        next(stream)
        served.server.drain()
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)


def test_a_dead_engine_ends_the_process(tmp_path: Path) -> None:
    with running(tiny_llama(tmp_path / "model")) as served:
        served.service.engine.model.register_forward_pre_hook(lambda *_: 1 / 0)
        for _ in range(MAX_FAILURES):
            with pytest.raises(openai.InternalServerError):
                served.client().completions.create(model="tiny", prompt="Hello")
        until(lambda: served.server.exit_code == 3, seconds=5)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_killed_engine_tells_its_clients_and_ends_the_process(tmp_path: Path) -> None:
    with running(chat_model(tmp_path / "model")) as served:
        stream = served.client().completions.create(model="tiny", prompt="Hello", max_tokens=200, stream=True)
        next(stream)

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        served.service.engine.model.register_forward_pre_hook(killed)
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            list(stream)
        until(lambda: served.server.exit_code == 3, seconds=5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "can be reached from other machines: give --api-key-file"),
        ({"slots": 0}, "slots must be at least 1, got 0"),
        ({"queue": 0}, "queue must be at least 1, got 0"),
        ({"context": 1}, "context must be at least 2, got 1"),
        ({"drain_s": -1.0}, "expected times above 0 s, got -1"),
        ({"timeouts": Timeouts(queue_s=0)}, "expected times above 0 s, got 0"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check(ServerSettings(**settings))


def test_beyond_this_machine_with_keys_or_on_request() -> None:
    check(ServerSettings(host="0.0.0.0", keys=("key",)))
    check(ServerSettings(host="0.0.0.0", without_keys=True))
    assert ServerSettings().host == "127.0.0.1"


def test_wrong_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama(tmp_path / "model")
    cases = [
        ([tmp_path / "gone"], "no model folder at"),
        ([model, "--context", 65], "context 65 is more than the 64 positions of the model"),
        ([model, "--host", "0.0.0.0"], "give --api-key-file FILE, or --without-keys"),
        ([model, "--api-key-file", tmp_path / "keys"], "cannot read the keys"),
        ([model, "--dtype", "int8"], "unknown dtype"),
    ]
    for arguments, message in cases:
        code, printed, errors = run(capsys, "serve", *arguments)
        assert (code, printed) == (2, "")
        assert message in errors and len(errors.strip().splitlines()) == 1, errors


def test_weights_that_changed_are_not_served_unless_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    niwaki.compress(tiny_llama(tmp_path / "model"), out, method="magnitude", target="0.5", device="cpu")
    served: list[int] = []
    monkeypatch.setattr("niwaki.serve.server.Server.run", lambda self: served.append(self.service.close() or 1))
    assert run(capsys, "serve", out, "--device", "cpu")[0] == 0 and served == [1]
    shard = sorted(out.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    code, printed, errors = run(capsys, "serve", out, "--device", "cpu")
    assert (code, printed, served) == (2, "", [1])
    assert str(shard) in errors and "expected SHA-256" in errors
    assert len([line for line in errors.strip().splitlines() if not line.startswith("20")]) == 1, errors
    assert run(capsys, "serve", out, "--device", "cpu", "--no-verify")[0] == 0 and served == [1, 1]


def test_without_the_packages_the_command_says_what_to_install(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("niwaki.serve.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    code, _, errors = run(capsys, "serve", tmp_path)
    assert code == 2 and "pip install prometheus-client" in errors


def test_the_commands_settings_reach_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr("niwaki.serve.server.serve", lambda model, settings: found.append((model, settings)) or 1)
    monkeypatch.setenv("NIWAKI_API_KEYS", "one")
    model_folder = tiny_llama(tmp_path / "m")
    arguments = [model_folder, "--port", 9, "--name", "n", "--slots", 3, "--queue", 4, "--context", 5, "--timeout", 6]
    code, _, _ = run(capsys, "serve", *arguments, "--drain", 7, "--dense", "--queue-timeout", 2, "--log-prompts")
    assert code == 1, "the exit code of the server"
    model, settings = found[0]
    wanted = ServerSettings(
        port=9, name="n", slots=3, queue=4, context=5, timeouts=Timeouts(2.0, 60.0, 6.0), drain_s=7.0, dense=True,
        keys=("one",), log_prompts=True,
    )  # fmt: skip
    assert (model, settings) == (str(model_folder), wanted)
