"""Who and what gets through to the gateway: keys, sizes, forms, and that nothing of it is logged.

The same middleware of `niwaki serve` is tested in tests/serve/test_server_limits.py.
"""

import asyncio
import base64
import logging
import random
import socket
from pathlib import Path

import pytest

from niwaki.errors import InputError
from niwaki.serve.http.limits import check_host, check_port
from support.rollouts import Answer, Setup, make, settings

HEADERS = [(b"host", b"localhost"), (b"content-type", b"application/json")]
STEP = {"steps": [1.0], "interval_s": 60, "min_requests": 40}


def post(setup: Setup, body: bytes, path: str = "/v1/completions", **headers: str) -> Answer:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return asyncio.run(setup.client.post(path, content=body, headers=named))


def test_every_address_but_health_wants_a_key(tmp_path: Path) -> None:
    setup = make(tmp_path, settings(policy=STEP), keys=("one", "two"))
    basic = "Basic " + base64.b64encode(b"anybody:two").decode()

    async def work() -> None:
        for path in ("/v1/models", "/metrics", "/rollout", "/rollout/data", "/rollout/plotly.js"):
            for wrong in ("", "Bearer three", "Bearer ", "Basic !!!", "Basic " + base64.b64encode(b"two").decode()):
                answer = await setup.client.get(path, headers={"authorization": wrong})
                assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Basic")
            for right in ("Bearer one", "bearer two", basic):
                assert (await setup.client.get(path, headers={"authorization": right})).status_code == 200, path
        for path in ("/health", "/ready"):
            assert (await setup.client.get(path)).status_code == 200

    asyncio.run(work())
    assert post(setup, b"{}").status_code == 401


def test_a_key_of_the_gateway_goes_no_further_and_that_of_an_upstream_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY_KEY", "canary-secret")
    own = settings(policy=STEP, canary={"url": "http://canary", "key_env": "CANARY_KEY"})
    setup = make(tmp_path, own, keys=("mine",))
    assert post(setup, b'{"prompt": "a", "model": "m"}', authorization="Bearer mine").status_code == 200
    assert setup.canary.headers[0]["authorization"] == "Bearer canary-secret"
    (tmp_path / "open").mkdir()
    setup = make(tmp_path / "open", settings(policy=STEP))
    assert post(setup, b'{"prompt": "a", "model": "m"}', authorization="Bearer theirs").status_code == 200
    assert setup.canary.headers[0]["authorization"] == "Bearer theirs"  # no keys here: it is meant for the upstream
    monkeypatch.delenv("CANARY_KEY")
    with pytest.raises(InputError, match=r"should be in \$CANARY_KEY"):
        make(tmp_path, own)


def test_sizes_and_forms(tmp_path: Path) -> None:
    setup = make(tmp_path, settings(policy=STEP, bounds={"body_bytes": 1000, "body_s": 0.05}))
    assert post(setup, b"x" * 1001).status_code == 413
    assert post(setup, b"{}", content_length="99999999999999999999999").status_code == 413
    assert post(setup, b"{}", content_length="-1").status_code == 413
    assert post(setup, b"\x1f\x8b", content_encoding="gzip").status_code == 415
    for body in (b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 900):
        assert post(setup, body).status_code == 400, body
    for path in ("/v1/embeddings", "/", "/rollout/../etc", "/rollout/secret.css", "/v1/models/", "/rollout/"):
        assert asyncio.run(setup.client.get(path)).status_code == 404
    assert asyncio.run(setup.client.get("/v1/completions")).status_code in (404, 405)
    assert setup.canary.asked == [] and setup.stable.asked == []

    async def slow() -> int:
        sent: list[int] = []

        async def receive() -> dict[str, object]:
            await asyncio.sleep(60)
            return {}

        async def send(message: dict[str, object]) -> None:
            sent.append(message.get("status", 0))  # type: ignore[arg-type]

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": HEADERS, "query_string": b""}
        await setup.client.app(scope, receive, send)
        return sent[0]

    assert asyncio.run(slow()) == 408


def test_whatever_comes_is_answered_with_a_4xx_or_passed_on(tmp_path: Path) -> None:
    rng = random.Random(0)
    pieces = [
        b"{", b"}", b"[", b"]", b'"model"', b":", b",", b'"m"', b'"prompt"', b'"a"', b"1e999", b"null", b"-", b"\x00",
        b"\xff", b'"messages"', b'"user"', b"NaN", b'"stream"', b"true", b'{"role": "user", "content": "a"}',
    ]  # fmt: skip
    setup = make(tmp_path, settings(policy=STEP, sampling={"shadow_frac": 1.0, "audit_frac": 1.0}))

    async def work() -> None:
        for _ in range(300):
            body = b"".join(rng.choices(pieces, k=rng.randrange(1, 9)))
            answer = await setup.client.post(rng.choice(["/v1/completions", "/v1/chat/completions"]), content=body)
            assert 400 <= answer.status_code < 500, body
        forms = [1, None, "a", [], {}, [1], [{"role": 1}], [{"role": "user", "content": [{"type": "image_url"}]}]]
        setup.canary.waits = setup.stable.waits = None
        for value in forms:
            for name in ("model", "user"):
                body = {"prompt": "a", "model": "m", name: value}
                assert (await setup.client.post("/v1/completions", body)).status_code == 200

    asyncio.run(work())


def test_neither_keys_nor_prompts_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        setup = make(tmp_path, settings(policy=STEP, sampling={"audit_frac": 1.0}), keys=("my-secret-key",))
        setup.canary.errors = 0.5

        async def work() -> None:
            for number in range(10):
                body = b'{"prompt": "my-secret-prompt %d", "model": "m"}' % number
                headers = {"authorization": "Bearer my-secret-key"}
                await setup.client.post("/v1/completions", content=body, headers=headers)
            await setup.gateway.background.idle()
            setup.gateway.controller.tick(setup.clock.now + 60)

        asyncio.run(work())
    assert "my-secret" not in caplog.text
    assert b"my-secret" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())


def test_only_what_a_web_page_cannot_send(tmp_path: Path) -> None:
    """A page may post text to any address, and reach this machine under a name of its own; keys stand for the name."""
    ask = b'{"prompt": "a", "model": "m"}'
    setup = make(tmp_path, settings(policy=STEP))
    assert post(setup, ask, content_type="text/plain").status_code == 415
    for host, status in (("evil.example", 403), ("", 403), ("127.0.0.1:8100", 200), ("[::1]:8100", 200)):
        assert post(setup, ask, host=host).status_code == status, host
    assert len(setup.canary.asked) == 2
    (tmp_path / "keyed").mkdir()
    keyed = make(tmp_path / "keyed", settings(policy=STEP), keys=("mine",))
    assert post(keyed, ask, host="ours.example", authorization="Bearer mine").status_code == 200


def test_open_to_others_only_with_keys() -> None:
    for host in ("127.0.0.1", "::1", "localhost"):
        check_host(host, ())
    for host in ("0.0.0.0", "192.168.1.2", "example.org", "::"):
        with pytest.raises(InputError, match="can be reached from other machines"):
            check_host(host, ())
        check_host(host, ("key",))


def test_a_port_that_is_taken_is_refused_before_a_model_is_loaded() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"cannot listen at 127.0.0.1:{port} .*in use"):
            check_port("127.0.0.1", port)
    check_port("127.0.0.1", port)
    with pytest.raises(InputError, match=r"cannot listen at 256\.256\.256\.256\.invalid:8000"):
        check_port("256.256.256.256.invalid", 8000)
    with pytest.raises(InputError, match="expected 0 to 65535"):
        check_port("127.0.0.1", 70000)
