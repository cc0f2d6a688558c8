"""Reading requests and answers of the OpenAI interface: their texts, how many tokens, whether a stream ended well.

Nothing here changes a byte: what clients send and get passes by, and only copies are read. Whatever has no single text
(images, token lists, several choices, tool calls) is not audited, which `UnreadError` says.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
Template = Callable[[list[dict[str, str]]], str]


class UnreadError(Exception):
    """A request or an answer that has no single text; the message says why, in a few words for a counter."""


def texts_of(path: str, payload: Mapping[str, Any]) -> list[dict[str, str]]:
    """The parts of a request as role and text. Raises UnreadError."""
    if path == COMPLETIONS:
        if not isinstance(payload.get("prompt"), str):
            raise UnreadError("prompt is not one text")
        return [{"role": "prompt", "content": payload["prompt"]}]
    messages = payload.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UnreadError("no messages")
    return [_message(message) for message in messages]


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise UnreadError("a message is no object")
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(one, dict) and isinstance(one.get("text"), str) for one in content):
        content = "".join(one["text"] for one in content)
    if not isinstance(content, str):
        raise UnreadError("a message is not text")
    return {"role": str(message.get("role", "user")), "content": content}


def first_text(texts: list[dict[str, str]]) -> str:
    """How the conversation began: everything up to what the user said first."""
    found = []
    for text in texts:
        found.append(text["content"])
        if text["role"] in ("user", "prompt"):
            break
    return "\n".join(found)


def prompt_text(path: str, texts: list[dict[str, str]], template: Template | None) -> str:
    """What both models are given to score an answer behind. Without a template a chat is a plain transcript."""
    if path == COMPLETIONS:
        return texts[0]["content"]
    if template is not None:
        return template(texts)
    return "".join(f"{text['role']}: {text['content']}\n" for text in texts) + "assistant: "


def answer_text(body: bytes, *, stream: bool) -> str:
    """What was answered. Raises UnreadError for anything but one text."""
    parts = _events(body) if stream else [_json(body)]
    found = []
    for part in parts:
        choices = part.get("choices")
        if not isinstance(choices, list) or len(choices) > 1:
            raise UnreadError("not one choice")
        for choice in choices:
            inner = choice.get("delta") or choice.get("message") or choice
            text = inner.get("content") if inner is not choice else choice.get("text")
            if inner.get("tool_calls") or choice.get("index", 0) != 0:
                raise UnreadError("not one text")
            found.append(text or "")
    answer = "".join(found)
    if not answer:
        raise UnreadError("an empty answer")
    return answer


def tokens_of(body: bytes) -> int | None:
    """Tokens written, as a whole answer says itself; None if it does not."""
    try:
        usage = _json(body).get("usage") or {}
    except UnreadError:
        return None
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) and tokens > 0 else None


def failed_at_once(chunk: bytes) -> bool:
    """Whether a stream begins with an error instead of a token."""
    line = chunk.lstrip().split(b"\n", 1)[0]
    if not line.startswith(b"data:"):
        return False
    try:
        return "error" in json.loads(line[5:])
    except (ValueError, TypeError):
        return False


def _events(body: bytes) -> list[dict[str, Any]]:
    lines = [line[5:].strip() for line in body.splitlines() if line.startswith(b"data:")]
    return [_json(line) for line in lines if line and line != b"[DONE]"]


def _json(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError as error:
        raise UnreadError("not JSON") from error
    if not isinstance(found, dict):
        raise UnreadError("no object")
    return found
