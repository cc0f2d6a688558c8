"""Audits: what two readings of one text say, and everything that is no reading."""

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest

from niwaki.errors import InputError, OutputError
from niwaki.rollout.answers import (
    CHAT,
    COMPLETIONS,
    UnreadableError,
    answer_text,
    request_texts,
    starts_with_error,
    transcript,
)
from niwaki.rollout.scoring import ScoredToken, audit, compare_scores, parse_tokens
from niwaki.rollout.store import Store, export_texts
from support.rollouts import make


def echo(*tokens: tuple[str, float | None, dict[str, float] | None]) -> dict[str, Any]:
    offsets, at = [], 0
    for text, _, _ in tokens:
        offsets.append(at)
        at += len(text)
    names = ("tokens", "token_logprobs", "top_logprobs")
    columns = {name: [token[place] for token in tokens] for place, name in enumerate(names)}
    return {"choices": [{"logprobs": {**columns, "text_offset": offsets}}]}


TEXT = "The cat sat"
WHOLE = echo(("The", None, None), (" cat", -1.0, {" dog": -0.5, " cat": -1.0}), (" sat", -0.1, {" sat": -0.1}))


def test_an_echo_is_read_token_by_token() -> None:
    assert parse_tokens(WHOLE, TEXT) == [ScoredToken(3, " cat", -1.0, " dog"), ScoredToken(7, " sat", -0.1, " sat")]
    more = echo(*[tuple(one) for one in zip(*(WHOLE["choices"][0]["logprobs"][name] for name in
        ("tokens", "token_logprobs", "top_logprobs")), strict=True)], (" on", -3.0, {" on": -3.0}))  # type: ignore[arg-type]  # fmt: skip
    assert parse_tokens(more, TEXT) == parse_tokens(WHOLE, TEXT)  # one new token too many is left out


@pytest.mark.parametrize(
    "found",
    [
        {}, {"choices": []}, {"choices": [{"logprobs": None}]}, {"choices": [{"logprobs": {"tokens": []}}]},
        echo((" only", -1.0, {" only": -1.0})),  # the new token alone, as llama.cpp's server answers
        echo(("The", None, None), (" cat sat", -math.inf, {" cat sat": -math.inf})),
    ],
)  # fmt: skip
def test_what_is_no_echo(found: dict[str, Any]) -> None:
    with pytest.raises((KeyError, TypeError, IndexError, ValueError)):
        parse_tokens(found, TEXT)


@pytest.mark.parametrize("counted", [True, False], ids=["offsets count them", "offsets do not"])
@pytest.mark.parametrize("names", [("<s>",), ("[gMASK]", "<sop>")])
def test_tokens_that_the_server_put_before_the_text_are_left_out(counted: bool, names: tuple[str, ...]) -> None:
    added = [(name, None if not place else -9.0, {name: -9.0} if place else None) for place, name in enumerate(names)]
    found = echo(*added, ("The", -2.0, {"The": -2.0}), (" cat sat", -1.0, {" cat": -1.0}))
    if not counted:
        lengths = sum(map(len, names))
        offsets = found["choices"][0]["logprobs"]["text_offset"]
        offsets[:] = [max(offset - lengths, 0) for offset in offsets]
    wanted = [ScoredToken(0, "The", -2.0, "The"), ScoredToken(3, " cat sat", -1.0, " cat")]
    assert parse_tokens(found, TEXT) == wanted
    assert [token.at for token in parse_tokens(echo(("\n", None, None), ("The", -2.0, {"The": -2.0})), "\nThe")] == [1]
    lowered = echo(("the", None, None), (" cat sat", -1.0, {" cat": -1.0}))
    assert [token.at for token in parse_tokens(lowered, TEXT)] == [3], "a tokenizer that changes the text"


def test_two_readings_are_compared_on_their_own_sides_of_the_boundary() -> None:
    dense = [ScoredToken(3, "b", -1.0, "b"), ScoredToken(4, "c", -2.0, "x"), ScoredToken(5, "d", -0.5, "d")]
    own = [ScoredToken(3, "b", -1.5, "b"), ScoredToken(4, "c", -0.2, "c"), ScoredToken(5, "d", -0.5, "d")]
    found = compare_scores(dense, own, 4)
    assert (found.tokens, found.top1_agreement) == (2, 0.5)
    assert found.logprob_gap == pytest.approx(0.9) and found.perplexity_ratio == pytest.approx(math.exp(0.5))
    assert found.places == (("c", "x", False), ("d", "d", True))
    assert "perplexity_ratio" not in compare_scores(dense, own, 0).values()
    with pytest.raises(UnreadableError, match="no token of the answer"):
        compare_scores(dense, own, 99)
    with pytest.raises(UnreadableError, match="different tokens"):
        compare_scores(dense, own[:2], 4)


def test_audits_of_fakes_see_how_far_they_differ(tmp_path: Path) -> None:
    setup = make(tmp_path)

    async def work(prompt: str) -> float:
        answer = "".join(setup.canary.write(prompt))
        found = await audit(setup.gateway.stable, setup.gateway.canary, "m", prompt, answer)
        return found.top1_agreement

    assert asyncio.run(work("the garden")) == 1.0
    setup.canary.differs, setup.canary.words = 0.4, 60
    assert asyncio.run(work("the garden")) == pytest.approx(0.6, abs=0.2)
    with pytest.raises(UnreadableError, match="too long"):
        asyncio.run(work("x" * 40_000))
    setup.canary.scores = False
    with pytest.raises(UnreadableError, match="the canary does not score given text"):
        asyncio.run(work("the garden"))


def test_texts_of_requests_and_answers() -> None:
    chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}]}]}
    assert request_texts(CHAT, chat) == [{"role": "user", "content": "Hi!"}]
    assert transcript(CHAT, request_texts(CHAT, chat)) == "user: Hi!\nassistant: "
    assert transcript(COMPLETIONS, request_texts(COMPLETIONS, {"prompt": "a"})) == "a"
    for path, payload in (
        (COMPLETIONS, {"prompt": ["a", "b"]}), (COMPLETIONS, {}), (CHAT, {}), (CHAT, {"messages": ["a"]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    ):  # fmt: skip
        with pytest.raises(UnreadableError):
            request_texts(path, payload)  # type: ignore[arg-type]
    stream = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: {"choices": []}\n\ndata: [DONE]\n\n'
    assert answer_text(stream, stream=True) == "a"
    assert answer_text(b'{"choices": [{"text": "b"}]}', stream=False) == "b"
    for body in (b"", b"[]", b'{"choices": [{}, {}]}', b'{"choices": [{"message": {"tool_calls": [1]}}]}', b"{}"):
        with pytest.raises(UnreadableError):
            answer_text(body, stream=False)
    assert starts_with_error(b'data: {"error": {"message": "no"}}\n\n') and not starts_with_error(stream)


def test_kept_texts_feed_adapt(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "state.sqlite")
    state = store.begin("canary", {"policy": {}}, 0.0, "begin")
    store.add_audit(state, 1.0, "served", 4, {}, None)
    with pytest.raises(InputError, match="1 audits, none with its text"):
        export_texts(store, tmp_path / "out.jsonl")
    for number in range(2):
        store.add_audit(state, 2.0, "served", 4, {}, {"prompt": f"庭 {number}", "answer": " 木", "places": []})
    assert export_texts(store, tmp_path / "out.jsonl") == 2
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "庭 0 木"}, {"text": "庭 1 木"}]
    with pytest.raises(OutputError, match="already exists"):
        export_texts(store, tmp_path / "out.jsonl")
    with pytest.raises(OutputError, match="the folder"):
        export_texts(store, tmp_path / "gone" / "out.jsonl")
