"""Requests are what they say, or refused by the name of what is wrong."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from niwaki.serve.request_models import ChatRequest, CompletionRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


def chat(**changes: Any) -> ChatRequest:
    return ChatRequest.model_validate_json(json.dumps({**CHAT, **changes}))


def text(**changes: Any) -> CompletionRequest:
    return CompletionRequest.model_validate_json(json.dumps({**TEXT, **changes}))


def test_what_clients_send_by_default_is_understood() -> None:
    asked = chat(
        temperature=1, top_p=1, n=1, stream=None, stop="\n", seed=3, max_completion_tokens=5, frequency_penalty=0,
        presence_penalty=0.0, logit_bias={}, tools=None, response_format={"type": "text"}, user="someone", store=False,
    )  # fmt: skip
    assert asked.stops == ["\n"] and asked.token_limit == 5 and asked.temperature == 1.0
    assert chat(max_tokens=7).token_limit == 7 and chat().token_limit is None and chat().stops == []
    assert chat(stream=True, stream_options={"include_usage": True}).usage_in_stream
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert chat(messages=[{"role": "user", "content": parts}]).messages[0].plain == {"role": "user", "content": "ab"}


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [1, 2], [[1, 2]]])
def test_one_prompt_in_any_of_four_forms(prompt: Any) -> None:
    assert text(prompt=prompt).prompt == ("hi" if "hi" in prompt else [1, 2])


WRONG_CHATS = [
    ({"n": 2}, "one answer per request"),
    ({"tools": [{"type": "function"}]}, "tools is not supported"),
    ({"frequency_penalty": 0.5}, "frequency_penalty is not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
    ({"chat_template": "{{ 1 }}"}, "templates come from the model's folder only"),
    ({"temperatur": 1}, "Extra inputs are not permitted"),
    ({"temperature": -1}, "greater than or equal to 0"),
    ({"temperature": "1"}, "valid number"),
    ({"top_p": 0}, "greater than 0"),
    ({"seed": 2**63}, "less than"),
    ({"stop": ["a"] * 5}, "at most 4 stop strings"),
    ({"stop": ""}, "at least 1 character"),
    ({"top_logprobs": 2}, "belong to logprobs=true"),
    ({"logprobs": True, "top_logprobs": 21}, "less than or equal to 20"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "disagree"),
    ({"stream_options": {"include_usage": True}}, "belong to stream=true"),
    ({"messages": []}, "at least 1 item"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "'system', 'developer', 'user' or 'assistant'"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "reads text only and fetches nothing",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_CHATS, ids=lambda value: str(value)[:30])
def test_what_is_not_answered_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        chat(**changes)
    assert message in str(refused.value)


WRONG_TEXTS = [
    ({"prompt": ["a", "b"]}, "one prompt per request, got 2"),
    ({"prompt": [[1], [2]]}, "one prompt per request, got 2"),
    ({"prompt": [1.5]}, "valid"),
    ({"prompt": [["a"]]}, "valid"),
    ({"prompt": [[[1]]]}, "valid"),
    ({"prompt": {"a": 1}}, "valid"),
    ({"best_of": 3}, "Input should be 1"),
    ({"suffix": "x"}, "suffix is not supported"),
    ({"logprobs": 21}, "less than or equal to 20"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG_TEXTS, ids=lambda value: str(value)[:30])
def test_texts_are_refused_alike(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        text(**changes)
    assert message in str(refused.value)


def test_errors_do_not_repeat_what_was_sent() -> None:
    with pytest.raises(ValidationError) as refused:
        chat(temperature="a secret")
    assert "a secret" not in str(refused.value)
