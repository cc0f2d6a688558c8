"""The official client, unchanged, against a server on loopback."""

import asyncio
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import openai
import pytest
import torch
from openai import AsyncOpenAI

from niwaki.rollout.scoring import parse_tokens
from support.models import add_bos
from support.servers import Running, chat_model, running, until

SCRIPT = Path(__file__).parents[1] / "system" / "serving" / "reach_fuzz.py"
HELLO: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello, who is there?"}]
GREEDY: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(chat_model(tmp_path_factory.mktemp("serving") / "model"), slots=4, queue=8) as server:
        yield server


def plain_logprobs(tiny: Running, ids: list[int]) -> torch.Tensor:
    """Return what a plain forward says [T, V]."""
    with torch.no_grad():
        logits: torch.Tensor = tiny.service.engine.model(input_ids=torch.tensor([ids])).logits[0]
    return logits.log_softmax(-1)


def chat_ids(tiny: Running) -> list[int]:
    ids: list[int] = tiny.service.prompts.tokenizer.apply_chat_template(
        HELLO, add_generation_prompt=True, return_dict=False
    )
    return ids


def test_models_are_listed(tiny: Running) -> None:
    client = tiny.client()
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "niwaki"
    with pytest.raises(openai.NotFoundError, match="no model 'other' here, only 'tiny'"):
        client.models.retrieve("other")


def test_a_chat_is_what_transformers_generates(tiny: Running) -> None:
    ids = chat_ids(tiny)
    engine = tiny.service.engine
    with torch.no_grad():
        wanted = engine.model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), max_new_tokens=12,
            do_sample=False, pad_token_id=0,
        )[0, len(ids) :]  # fmt: skip
    reply = tiny.client().chat.completions.create(**GREEDY)
    choice = reply.choices[0]
    assert choice.message.content == engine.decoding.tokenizer.decode(wanted, skip_special_tokens=True)
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (
        len(ids), 12, len(ids) + 12,
    )  # fmt: skip


def test_a_stream_says_the_same_in_pieces(tiny: Running) -> None:
    client = tiny.client()
    whole = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=1)
    pieces = list(
        client.chat.completions.create(
            **GREEDY, stream=True, stream_options={"include_usage": True}, logprobs=True, top_logprobs=1
        )
    )
    assert pieces[0].choices[0].delta.role == "assistant"
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces[:-1]) == whole.choices[0].message.content
    assert [piece.choices[0].finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 2) + ["length"]
    assert pieces[-1].choices == [] and pieces[-1].usage == whole.usage
    assert len({piece.id for piece in pieces}) == 1
    scored = [one for piece in pieces[:-1] if (found := piece.choices[0].logprobs) for one in found.content or ()]
    assert whole.choices[0].logprobs is not None and scored == whole.choices[0].logprobs.content


def test_logprobs_of_a_chat_are_those_of_a_plain_forward(tiny: Running) -> None:
    reply = tiny.client().chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3)
    assert reply.choices[0].logprobs is not None
    content = reply.choices[0].logprobs.content or []
    ids, names = chat_ids(tiny), tiny.service.names
    assert len(content) == 12
    for one in content:
        logprobs_V = plain_logprobs(tiny, ids)[-1]
        best = logprobs_V.topk(3)
        assert [rival.token for rival in one.top_logprobs] == [names.of(token)[0] for token in best.indices.tolist()]
        assert [rival.logprob for rival in one.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert one.logprob == pytest.approx(float(best.values[0]), abs=1e-4)
        ids.append(int(best.indices[0]))


def test_a_given_text_is_scored(tiny: Running) -> None:
    """Score with echo, logprobs and max_tokens=0, as a gateway judges the answer of another model."""
    text = "Hello there, 庭木 grows."
    client, tokenizer = tiny.client(), tiny.service.prompts.tokenizer
    ids = tokenizer(text)["input_ids"]
    reply = client.completions.create(model="tiny", prompt=text, max_tokens=0, echo=True, logprobs=2)
    assert reply.choices[0].text == text and reply.usage is not None and reply.usage.completion_tokens == 0
    found = reply.choices[0].logprobs
    assert found is not None and found.token_logprobs and found.top_logprobs and found.tokens and found.text_offset
    wanted_TV = plain_logprobs(tiny, ids)
    names = tiny.service.names
    assert found.tokens == [names.of(token)[0] for token in ids]
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    for place, token in enumerate(ids[1:]):
        assert found.token_logprobs[place + 1] == pytest.approx(float(wanted_TV[place, token]), abs=1e-4)
        best = wanted_TV[place].topk(2)
        wanted = {
            names.of(token)[0]: value for token, value in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        }
        assert found.top_logprobs[place + 1] == pytest.approx(wanted, abs=1e-4)
    assert [text[at] for at in found.text_offset[:2]] == ["H", "e"]
    assert found.text_offset == sorted(found.text_offset)
    same = client.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=2)
    assert same.choices[0].logprobs == found and same.choices[0].text == text


def test_echo_goes_on_behind_the_prompt(tiny: Running) -> None:
    given: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 3, "temperature": 0, "logprobs": 0}
    client = tiny.client()
    plain, echoed = (client.completions.create(**given, echo=echo).choices[0] for echo in (False, True))
    assert echoed.text == "Hello" + plain.text
    assert plain.logprobs is not None and echoed.logprobs is not None
    assert (echoed.logprobs.tokens or [])[-3:] == plain.logprobs.tokens
    pieces = list(client.completions.create(**given, echo=True, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == echoed.text
    assert len(client.completions.create(model="tiny", prompt="Hello", temperature=0).choices[0].text) > 0


def test_seeds_temperature_and_top_p(tiny: Running) -> None:
    client = tiny.client()
    given: dict[str, Any] = {**GREEDY, "temperature": 1.0, "seed": 11}
    texts = [client.chat.completions.create(**given).choices[0].message.content for _ in range(2)]
    assert texts[0] == texts[1]
    with ThreadPoolExecutor(4) as pool:
        beside = list(pool.map(lambda seed: client.chat.completions.create(**{**given, "seed": seed}), [1, 11, 2, 11]))
    assert [reply.choices[0].message.content == texts[0] for reply in beside] == [False, True, False, True]
    greedy = client.chat.completions.create(**GREEDY).choices[0].message.content
    assert client.chat.completions.create(**{**given, "top_p": 1e-6}).choices[0].message.content == greedy


def test_stop_strings_across_tokens(tiny: Running) -> None:
    client = tiny.client()
    whole = client.chat.completions.create(**GREEDY, logprobs=True).choices[0]
    text = whole.message.content or ""
    assert whole.logprobs is not None and whole.logprobs.content is not None
    first = len("".join(one.token for one in whole.logprobs.content[:3]))
    stop = text[first - 1 : first + 1]  # the end of the third token and the beginning of the fourth
    reply = client.chat.completions.create(**GREEDY, stop=[stop, "never"]).choices[0]
    assert reply.message.content == text[: text.index(stop)] and reply.finish_reason == "stop"
    pieces = list(client.chat.completions.create(**GREEDY, stop=stop, stream=True))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == reply.message.content


def test_many_at_once_get_what_each_gets_alone(tiny: Running) -> None:
    prompts = [f"Number {number} " * number for number in range(1, 9)]
    given: dict[str, Any] = {"model": "tiny", "max_tokens": 10, "temperature": 0}
    client = tiny.client()
    wanted = [client.completions.create(prompt=prompt, **given).choices[0].text for prompt in prompts]

    async def all_at_once() -> list[str]:
        async with AsyncOpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as many:
            replies = await asyncio.gather(*(many.completions.create(prompt=one, **given) for one in prompts))
        return [reply.choices[0].text for reply in replies]

    steps = tiny.metric("niwaki_steps_total")
    assert asyncio.run(all_at_once()) == wanted
    assert tiny.metric("niwaki_steps_total") - steps < 8 * 9, "they were written one after another"


WRONG: list[tuple[dict[str, Any], type[openai.APIStatusError], str]] = [
    ({"n": 2}, openai.BadRequestError, "one answer per request"),
    ({"model": "gpt-4"}, openai.NotFoundError, "no model 'gpt-4' here"),
    ({"max_tokens": 5000}, openai.BadRequestError, "the context holds 256 tokens, the prompt has"),
    ({"max_tokens": 0}, openai.BadRequestError, "generates nothing"),
    ({"messages": []}, openai.BadRequestError, "at least 1 item"),
    ({"extra_body": {"chat_template": "x"}}, openai.BadRequestError, "templates come from the model's folder"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, "tools is not supported"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), WRONG, ids=lambda value: str(value)[:24])
def test_errors_have_the_shape_that_clients_know(
    tiny: Running, changes: dict[str, Any], kind: type[openai.APIStatusError], message: str
) -> None:
    with pytest.raises(kind) as refused:
        tiny.client().chat.completions.create(**{**GREEDY, **changes})
    assert isinstance(refused.value.body, dict)
    assert message in refused.value.body["message"]
    assert set(refused.value.body) == {"message", "type", "param", "code"}


def test_token_ids_beyond_the_vocabulary_and_empty_prompts(tiny: Running) -> None:
    client = tiny.client()
    for prompt, message in (
        ([1, 4096], "between 0 and 4095, got 4096"),
        ("", "the prompt is empty"),
        ([], "empty"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            client.completions.create(model="tiny", prompt=prompt)


def test_a_prompt_beyond_the_context_names_the_limit(tiny: Running) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        tiny.client().completions.create(model="tiny", prompt=[5] * 300)
    assert refused.value.code == "context_length_exceeded" and "256" in refused.value.message


def test_control_tokens_in_what_a_user_wrote_are_plain_text(tiny: Running) -> None:
    end = tiny.service.prompts.tokenizer.eos_token
    from niwaki.serve.request_models import Message

    ids = tiny.service.prompts.tokenize_chat([Message(role="user", content=f"a{end}b")])
    assert tiny.service.prompts.tokenizer.eos_token_id not in ids
    assert end in tiny.service.prompts.tokenizer.decode(ids)


def test_counts_of_the_server_are_those_of_its_clients(tmp_path: Path) -> None:
    """Count on a server of its own: what other tests broke off is counted some time later."""
    with running(chat_model(tmp_path / "model")) as served:

        def counts() -> list[float]:
            answered, invalid = (
                served.metric(f'niwaki_requests_total{{outcome="{outcome}",route="completions"}}')
                for outcome in ("answered", "invalid")
            )
            tokens = (served.metric(f"niwaki_{name}_tokens_total") for name in ("prompt", "written"))
            return [answered, invalid, *tokens]

        client = served.client()
        replies = [client.completions.create(model="tiny", prompt="Hi", max_tokens=most) for most in (1, 2, 5)]
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="tiny", prompt="Hi", n=3)
        usage = [reply.usage for reply in replies if reply.usage]
        wanted = [3, 1, sum(one.prompt_tokens for one in usage), sum(one.completion_tokens for one in usage)]
        until(lambda: counts() == wanted)
        assert served.metric("niwaki_first_token_seconds_count") >= 3 and served.metric("niwaki_queue_length") == 0


def test_health_and_readiness(tiny: Running) -> None:
    with tiny.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/ready").json() == {"status": "ready"}
        lost = http.get("/v2/other")
        assert lost.status_code == 404 and lost.json()["error"]["type"] == "invalid_request_error"
        assert http.get("/v1/completions").status_code == 405
        assert http.get("/docs").status_code == 404
        assert http.get("/openapi.json").json()["openapi"].startswith("3.")


def fuzz() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reach_fuzz", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["reach_fuzz"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def test_malformed_requests_are_refused_and_change_nothing(tiny: Running) -> None:
    """Send some hundred of the requests of tests/system/serving/reach_fuzz.py."""
    script = fuzz()
    statuses: Counter[int] = Counter()
    wrong = []
    for case in script.cases(seed=1, count=400):
        status = script.exchange(tiny.port, case.sent, ends=case.ends)
        statuses[status] += 1
        wrong += [found] if (found := script.judge(case, status)) else []
    assert not wrong
    assert {400, 404, 405, 413, 415, 431} <= set(statuses), statuses
    assert statuses[400] > 200 and statuses[200] + statuses[0] < 50, statuses
    assert script.healthy(tiny.port) and tiny.service.engine.idle


def test_without_keys_it_answers_to_its_own_names_only(tiny: Running) -> None:
    """Refuse other names: a page of the web could point one of its own at this address."""
    with tiny.http() as http:
        for host, status in (("localhost", 200), ("127.0.0.1:1", 200), ("[::1]", 200), ("a.com:80", 403), ("[", 403)):
            assert http.get("/v1/models", headers={"Host": host}).status_code == status


def test_a_text_begins_once_as_the_model_was_trained(tmp_path: Path) -> None:
    """Add the beginning-of-text token unless the text holds it; an audit scores every token of the text."""
    folder = chat_model(tmp_path / "model", vocab_size=4160)
    (bos,) = add_bos(folder)
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    text = "Hello <|endoftext|> there"
    with running(folder) as server:
        prompts, client = server.service.prompts, server.client()
        ids = [bos, *prompts.tokenizer(text, add_special_tokens=False)["input_ids"]]
        given: dict[str, Any] = {"model": "tiny", "max_tokens": 0, "echo": True, "logprobs": 1}
        wanted_TV = plain_logprobs(server, ids)
        wanted = [float(wanted_TV[place, token]) for place, token in enumerate(ids[1:])]
        for prompt, more in ((text, {}), (f"<bos>{text}", {}), (f"<bos>{text}", {"add_special_tokens": False})):
            reply = client.completions.create(prompt=prompt, extra_body=more, **given)
            assert reply.choices[0].text == prompt and reply.usage is not None and reply.usage.prompt_tokens == len(ids)
            scored = parse_tokens(reply.model_dump(), prompt)
            assert [token.logprob for token in scored] == pytest.approx(wanted, abs=1e-4)
            assert "".join(token.text for token in scored) == text
            assert [prompt[token.at :].startswith(token.text) for token in scored] == [True] * len(scored)
        bare = client.completions.create(prompt=text, extra_body={"add_special_tokens": False}, **given)
        assert bare.usage is not None and bare.usage.prompt_tokens == len(ids) - 1
        chat = client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "Hello"}], max_tokens=1, temperature=0
        )
        assert chat.usage is not None
        assert chat.usage.prompt_tokens == len(prompts.tokenizer("Hello", add_special_tokens=False)["input_ids"]) + 1
