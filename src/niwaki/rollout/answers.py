"""Texts and token counts of requests and answers of the OpenAI interface.

The functions read copies and change no byte. Requests and answers without one single text are not audited and raise
`UnreadableError`: images, token lists, several choices, tool calls.
"""

import json
from collections.abc import Mapping
from typing import Any

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class UnreadableError(Exception):
    """Error of a request or an answer without one single text. The message is a few words for a counter."""


def request_texts(path: str, payload: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the messages of a request as role and text. Raise UnreadableError."""
    if path == COMPLETIONS:
        if not isinstance(payload.get("prompt"), str):
            raise UnreadableError("the prompt is not a single text")
        return [{"role": "prompt", "content": payload["prompt"]}]
    messages = payload.get("messages")
    if not isinstance(messages, list) or not messages:
        raise UnreadableError("the request has no messages")
    return [_message(message) for message in messages]


def _message(message: Any) -> dict[str, str]:
    if not isinstance(message, dict):
        raise UnreadableError("a message is not an object")
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(one, dict) and isinstance(one.get("text"), str) for one in content):
        content = "".join(one["text"] for one in content)
    if not isinstance(content, str):
        raise UnreadableError("a message is not text")
    return {"role": str(message.get("role", "user")), "content": content}


def first_text(texts: list[dict[str, str]]) -> str:
    """Return the start of the conversation, up to the first message of the user."""
    contents = []
    for text in texts:
        contents.append(text["content"])
        if text["role"] in ("user", "prompt"):
            break
    return "\n".join(contents)


def transcript(path: str, texts: list[dict[str, str]]) -> str:
    """Return the text before an answer that both models score. A chat is a plain transcript."""
    if path == COMPLETIONS:
        return texts[0]["content"]
    return "".join(f"{text['role']}: {text['content']}\n" for text in texts) + "assistant: "


def answer_text(body: bytes, *, stream: bool) -> str:
    """Return the text of an answer. Raise UnreadableError if it is not a single text."""
    parts = _events(body) if stream else [_json(body)]
    pieces = []
    for part in parts:
        choices = part.get("choices")
        if not isinstance(choices, list) or len(choices) > 1:
            raise UnreadableError("the answer does not have one choice")
        for choice in choices:
            inner = choice.get("delta") or choice.get("message") or choice
            text = inner.get("content") if inner is not choice else choice.get("text")
            if inner.get("tool_calls") or choice.get("index", 0) != 0:
                raise UnreadableError("the answer is not a single text")
            pieces.append(text or "")
    answer = "".join(pieces)
    if not answer:
        raise UnreadableError("the answer is empty")
    return answer


def completion_tokens(body: bytes) -> int | None:
    """Return the number of generated tokens that an answer reports, None if it reports none."""
    try:
        usage = _json(body).get("usage") or {}
    except UnreadableError:
        return None
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) and tokens > 0 else None


def starts_with_error(chunk: bytes) -> bool:
    """Check that a stream starts with an error in place of a token."""
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
        value = json.loads(body)
    except ValueError as error:
        raise UnreadableError("the body is not JSON") from error
    if not isinstance(value, dict):
        raise UnreadableError("the body is not a JSON object")
    return value
