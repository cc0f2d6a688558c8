"""The gateway between fake upstreams: what clients get, what is counted, and how roll-outs end."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from niwaki.rollout.gateway import ROUTE_S
from niwaki.rollout.http_client import UpstreamError
from support.rollouts import Setup, make, settings


def go(work: Callable[[Setup], Awaitable[None]], setup: Setup) -> None:
    """Runs one test on one loop."""

    async def whole() -> None:
        await work(setup)
        await setup.gateway.close()

    asyncio.run(whole())


def one_step(**more: object) -> dict[str, object]:
    return {"steps": [1.0], "interval_s": 60, "min_requests": 40, "min_audits": 5, **more}


def state(setup: Setup) -> tuple[str, int]:
    found = setup.gateway.controller.state
    return found.status, found.step


def reason(setup: Setup) -> str:
    assert setup.gateway.controller.verdict is not None
    return setup.gateway.controller.verdict.reason


def test_an_equal_canary_is_promoted_step_by_step(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        shares = []
        for number in range(12):
            shares.append(setup.gateway.controller.share)
            answers = await setup.interval(80, 1000 * number)
            assert {answer.status_code for answer in answers} == {200}
            if state(setup)[0] == "promoted":
                break
        assert state(setup) == ("promoted", 1) and sorted(set(shares)) == [0.5, 1.0]
        actions = [one["action"] for one in setup.gateway.controller.store.decisions(setup.gateway.controller.state)]
        assert actions[0] == "promote" and actions[-1] == "begin" and "widen" in actions and "return" not in actions

    go(work, make(tmp_path))


def test_two_percent_errors_are_returned_in_two_intervals_and_nobody_sees_one(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        setup.canary.errors, setup.canary.words = 0.02, 1
        for number in range(2):
            answers = await setup.interval(500, 1000 * number)
            assert all(answer.status_code == 200 and answer.json()["choices"] for answer in answers)
        assert state(setup)[0] == "returned" and setup.gateway.controller.share == 0
        assert "error_rate is certainly above 0.002" in reason(setup)
        fallbacks = sum(one.requests["fallback"] for one in setup.gateway.controller.counters.intervals)
        assert fallbacks > 5
        asked = len(setup.canary.asked)
        await setup.interval(20, 5000)
        assert len(setup.canary.asked) == asked  # no more traffic

    go(work, make(tmp_path, settings(policy=one_step(min_requests=500), sampling={"audit_frac": 0.0})))


@pytest.mark.parametrize("stream", [False, True])
def test_twice_the_latency_is_returned_in_two_intervals(tmp_path: Path, stream: bool) -> None:
    async def work(setup: Setup) -> None:
        setup.canary.slow = 2.0
        for number in range(2):
            await setup.interval(80, 1000 * number, stream=stream)
        assert state(setup)[0] == "returned"
        assert "decode_latency_ratio is certainly above 1.5" in reason(setup)

    go(work, make(tmp_path))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_degraded_agreement_is_returned_in_two_intervals(tmp_path: Path, chat: bool, stream: bool) -> None:
    async def work(setup: Setup) -> None:
        setup.canary.differs = 0.3
        for number in range(2):
            await setup.interval(50, 1000 * number, chat=chat, stream=stream)
        assert state(setup)[0] == "returned"
        assert "top1_agreement is certainly below 0.9" in reason(setup)

    go(work, make(tmp_path))


def test_a_canary_that_turns_bad_after_promotion_is_returned(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        for number in range(3):
            await setup.interval(60, 1000 * number)
        assert state(setup)[0] == "promoted"
        setup.canary.status = 503
        answers = await setup.interval(40, 9000)
        assert {answer.status_code for answer in answers} == {200} and state(setup)[0] == "returned"

    go(work, make(tmp_path, settings(policy=one_step())))


@pytest.mark.parametrize("stream", [False, True])
def test_a_canary_that_fails_before_its_first_byte_is_answered_for(tmp_path: Path, stream: bool) -> None:
    async def work(setup: Setup) -> None:
        for fault in (500, 503, 429, 404):
            setup.canary.status = fault
            answer = await setup.ask(fault, stream=stream)
            assert answer.status_code == 200 and "dense" in answer.text and "small" not in answer.text
        setup.canary.status, setup.canary.breaks_after = 200, 0
        if stream:
            assert "dense" in (await setup.ask(7, stream=True)).text
        counters = setup.gateway.controller.counters
        assert counters.open.histogram("error_rate").mean == 1.0
        assert counters.open.skipped["answered by dense, the canary failed: status 503"] == 1

    go(work, make(tmp_path, settings(policy=one_step())))


def test_a_request_that_both_refuse_is_no_error_of_the_canary(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        setup.canary.status = setup.stable.status = 400
        answer = await setup.ask(1)
        assert answer.status_code == 400 and answer.json() == {"error": {"message": "broken"}}
        assert not setup.gateway.controller.counters.open.histogram("error_rate").total

    go(work, make(tmp_path, settings(policy=one_step())))


def test_a_canary_that_hangs_is_answered_for_and_a_dead_dense_model_is_a_502(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        setup.canary.waits = asyncio.Event().wait  # type: ignore[assignment]
        answer = await setup.ask(1, stream=True)
        assert answer.status_code == 200 and "dense" in answer.text
        assert setup.gateway.controller.counters.open.skipped["answered by dense, the canary failed: timeout"] == 1

    bounds = {"canary_first_byte_s": 0.05, "answer_s": 60}
    go(work, make(tmp_path, settings(policy=one_step(), bounds=bounds)))

    async def dead(setup: Setup) -> None:
        setup.stable.waits = asyncio.Event().wait  # type: ignore[assignment]
        answer = await setup.ask(1)
        assert answer.status_code == 502 and "stable" not in answer.text
        assert answer.json()["error"]["type"] == "upstream_error"

    (tmp_path / "dead").mkdir()
    go(dead, make(tmp_path / "dead", settings(policy=one_step(steps=[0.0, 1.0]), bounds={"answer_s": 0.05})))


@pytest.mark.parametrize("stream", [False, True])
def test_bytes_pass_unchanged_and_shadows_change_nothing(tmp_path: Path, stream: bool) -> None:
    """With every request copied to a canary that fails on all: the same bytes as from the dense model itself."""
    plain, copied = tmp_path / "plain", tmp_path / "copied"
    bodies: dict[str, list[bytes]] = {}
    for folder, share in ((plain, 0.0), (copied, 1.0)):
        folder.mkdir()

        async def work(setup: Setup, name: str = folder.name) -> None:
            setup.canary.errors = 1.0
            answers = [await setup.ask(number, stream=stream) for number in range(12)]
            await setup.gateway.background.idle()
            bodies[name] = [answer.content for answer in answers]
            own = setup.gateway.controller.counters.open
            assert own.requests["stable"] == 12 and own.requests["shadow"] == len(setup.canary.asked)
            assert own.histogram("error_rate").total == own.requests["shadow"] == (12 if name == "copied" else 0)

        own = settings(policy=one_step(steps=[0.0, 1.0]), sampling={"shadow_frac": share, "max_shadows": 100})
        go(work, make(folder, own))
    assert bodies["plain"] == bodies["copied"] and all(b"dense" in body for body in bodies["plain"])


def test_shadows_wait_for_nobody_and_are_dropped_when_busy(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        setup.canary.waits = asyncio.Event().wait  # type: ignore[assignment]
        answers = [await setup.ask(number) for number in range(10)]  # each comes back though no copy ever ends
        assert {answer.status_code for answer in answers} == {200}
        assert len(setup.canary.asked) <= 3
        assert setup.gateway.controller.counters.open.skipped["shadow dropped: 3 were running"] == 7

    sampling = {"shadow_frac": 1.0, "max_shadows": 3}
    go(work, make(tmp_path, settings(policy=one_step(steps=[0.0, 1.0]), sampling=sampling)))


def test_shadows_alone_give_all_the_evidence(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        for number in range(2):
            await setup.interval(60, 1000 * number)
        assert state(setup) == ("running", 1)  # from 0 to the first share that users see
        assert setup.gateway.controller.share == 0.25

    sampling = {"shadow_frac": 1.0, "audit_frac": 1.0, "max_shadows": 100, "max_audits": 100}
    own = settings(policy=one_step(steps=[0.0, 0.25, 1.0]), sampling=sampling)
    go(work, make(tmp_path, own, limits={"error_rate": 0.002, "decode_latency_ratio": 1.5, "top1_agreement": 0.9}))


def test_important_requests_stay_on_dense_and_are_no_evidence(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        prompts = {"prompt": "please mind the LAW here"}, {"prompt": "x" * 600}
        for more in (*prompts, {"model": "big-one"}):
            assert (await setup.ask(1, **more)).json()["model"] == "dense"
        body = {"model": "m", "prompt": "short", "user": "u"}
        headed = await setup.client.post("/v1/completions", json=body, headers={"X-Priority": "high"})
        assert headed.json()["model"] == "dense"
        assert (await setup.ask(1)).json()["model"] == "small"
        await setup.gateway.background.idle()
        own = setup.gateway.controller.counters.open
        assert own.requests == {"important": 4, "canary": 1} and own.histogram("error_rate").total == 1

    rules = [{"prompt": "(?i)law"}, {"min_characters": 500}, {"model": "^big"}, {"header": "x-priority: high"}]
    go(work, make(tmp_path, settings(policy=one_step(), important=rules, sampling={"shadow_frac": 1.0})))


def test_a_pattern_that_takes_forever_holds_up_nobody(tmp_path: Path) -> None:
    """Ten prompts that it takes forever for are answered by dense, and others are answered meanwhile."""

    async def work(setup: Setup) -> None:
        async def timed(**more: object) -> tuple[float, str]:
            begin = time.perf_counter()
            model = (await setup.ask(1, **more)).json()["model"]
            return time.perf_counter() - begin, model

        slow = [asyncio.create_task(timed(prompt="a" * 60 + "!")) for _ in range(10)]
        pauses = []
        while not all(task.done() for task in slow):
            begin = time.perf_counter()
            await asyncio.sleep(0.01)
            pauses.append(time.perf_counter() - begin)
        found = [await task for task in slow]
        assert {model for _, model in found} == {"dense"} and max(seconds for seconds, _ in found) < ROUTE_S + 4
        assert len(pauses) > 5 and sorted(pauses)[len(pauses) // 2] < 0.2  # the loop went on
        assert (await timed(prompt="fine"))[1] == "small"
        await setup.gateway.background.idle()
        skipped = setup.gateway.controller.counters.open.skipped
        assert skipped["to dense: the rules of important requests took too long"] == 10

    go(work, make(tmp_path, settings(policy=one_step(), important=[{"prompt": "(a|aa)+$"}])))


def test_users_stay_where_they_are_while_the_share_widens(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        first = [(await setup.ask(number)).json()["model"] for number in range(40)]
        again = [(await setup.ask(number)).json()["model"] for number in range(40)]
        assert first == again and {"dense", "small"} == set(first)

    go(work, make(tmp_path))


def test_a_stream_that_breaks_off_is_recorded(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        setup.canary.breaks_after = 3
        with pytest.raises(UpstreamError, match="broken off"):  # over a network the line is cut
            await setup.ask(1, stream=True)
        assert setup.gateway.controller.counters.open.histogram("error_rate").mean == 1.0

    go(work, make(tmp_path, settings(policy=one_step())))


def test_audits_that_cannot_be_are_counted_and_never_widen(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        setup.stable.scores = False
        for number in range(3):
            await setup.interval(50, 1000 * number)
        assert state(setup) == ("running", 0)
        assert "0 of 5 audits" in reason(setup)
        why = "not audited: the dense model does not score given text (echo with logprobs)"
        assert sum(one.skipped[why] for one in setup.gateway.controller.counters.intervals) > 50

    go(work, make(tmp_path))


def test_texts_are_kept_only_when_asked_for(tmp_path: Path) -> None:
    for keep in (False, True):
        folder = tmp_path / str(keep)
        folder.mkdir()

        async def work(setup: Setup, keep: bool = keep) -> None:
            setup.canary.differs = 0.3
            await setup.interval(10)
            audits = setup.gateway.controller.store.audits(None)
            assert len(audits) == 10 and all(bool(one["texts"]) == keep for one in audits)
            data = (await setup.client.get("/rollout/data")).json()
            assert ("of the " in json.dumps(data["audits"])) == keep and data["keep_texts"] == keep

        sampling = {"audit_frac": 1.0, "max_audits": 100, "keep_texts": keep}
        go(work, make(folder, settings(policy=one_step(), sampling=sampling)))
        content = b"".join(path.read_bytes() for path in folder.iterdir())
        assert (b" of the " in content) == keep


@pytest.mark.parametrize("chat", [True, False])
@pytest.mark.parametrize("named", [True, False], ids=["token names known", "token names unknown"])
def test_a_rendered_chat_is_scored_with_one_beginning(tmp_path: Path, named: bool, chat: bool) -> None:
    """With the tokenizer's names the chat is complete and the servers add nothing; without them they add the token."""
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ bos_token }}{% for m in messages %}[{{ m.content }}]{% endfor %}")
    if named:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))

    async def work(setup: Setup) -> None:
        await setup.interval(4, chat=chat)
        for model in (setup.stable, setup.canary):
            assert len(model.echoed) == 4
            for payload in model.echoed:
                complete = named and chat
                assert payload.get("add_special_tokens", True) is not complete
                assert payload["prompt"].startswith("<s>") == complete
                assert payload["prompt"].count("<s>") == int(complete)
        audits = setup.gateway.controller.store.audits(None)
        assert len(audits) == 4 and not any("<s>" in str(one["texts"]["prompt"]) for one in audits)

    sampling = {"audit_frac": 1.0, "max_audits": 100, "keep_texts": True}
    go(work, make(tmp_path, settings(policy=one_step(), sampling=sampling, chat_template=str(template))))


def test_models_are_renamed_for_an_upstream_that_calls_them_otherwise(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        await setup.ask(1)
        assert setup.canary.asked[0]["model"] == "other" and setup.canary.asked[0]["max_tokens"] == 8

    own = settings(policy=one_step(), canary={"url": "http://canary", "model": "other"})
    go(work, make(tmp_path, own))


def test_counts_are_those_of_the_client(tmp_path: Path) -> None:
    async def work(setup: Setup) -> None:
        setup.canary.errors = 0.1
        answers = [await setup.ask(number, stream=number % 3 == 0) for number in range(150)]
        assert all(answer.status_code == 200 for answer in answers)
        text = (await setup.client.get("/metrics")).text
        counts = [float(line.split()[-1]) for line in text.splitlines() if line.startswith("niwaki_rollout_requests{")]
        assert sum(counts) == 150 and 'side="fallback"' in text
        assert 'niwaki_refused_connections_total{reason="late"} 0.0' in text
        setup.gateway.count_refusal("late")
        assert 'niwaki_refused_connections_total{reason="late"} 1.0' in (await setup.client.get("/metrics")).text
        own = [line for line in text.splitlines() if 'side="fallback"' in line]
        assert float(own[0].split()[-1]) == sum(payload is not None for payload in setup.stable.asked) - counts[0]

    go(work, make(tmp_path))
