"""Answers in the shapes of OpenAI's API."""

from typing import Any, Literal

from pydantic import BaseModel

Reason = str | None


class Usage(BaseModel):
    """Tokens of a prompt and its answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, written: int) -> "Usage":
        """Both and their sum."""
        return cls(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written)


class Rival(BaseModel):
    """A token, its log-probability and its bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(Rival):
    """A token of an answer, with the likeliest at its place."""

    top_logprobs: list[Rival]


class ChatLogprobs(BaseModel):
    """The tokens of an answer or of a piece of it."""

    content: list[ChatToken]
    refusal: None = None


class TextLogprobs(BaseModel):
    """The tokens of a text as four lists of equal length."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class Choice(BaseModel):
    """The only answer."""

    index: int = 0
    finish_reason: Reason = None


class ChatChoice(Choice):
    """A whole answer."""

    message: dict[str, Any]
    logprobs: ChatLogprobs | None = None


class ChatDelta(Choice):
    """What a piece adds."""

    delta: dict[str, Any]
    logprobs: ChatLogprobs | None = None


class TextChoice(Choice):
    """A text or a piece of one."""

    text: str
    logprobs: TextLogprobs | None = None


class Reply(BaseModel):
    """What goes around choices."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk", "text_completion"]
    created: int
    model: str
    choices: list[ChatChoice] | list[ChatDelta] | list[TextChoice]
    usage: Usage | None = None
