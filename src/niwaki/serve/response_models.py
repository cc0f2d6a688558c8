"""Models of the responses, in the format of the OpenAI API."""

from typing import Any, Literal

from pydantic import BaseModel


class Usage(BaseModel):
    """Token counts of a prompt and its answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, generated: int) -> "Usage":
        """Return both counts with their sum."""
        return cls(prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated)


class TopLogprob(BaseModel):
    """Token with its log-probability and its bytes."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(TopLogprob):
    """Token of an answer, with the most likely tokens at its position."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Tokens of an answer or of a chunk of it."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class TextLogprobs(BaseModel):
    """Tokens of a text as four lists of equal length."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    text_offset: list[int] = []


class BaseChoice(BaseModel):
    """Fields of every choice. There is one choice per response."""

    index: int = 0
    finish_reason: str | None = None


class ChatChoice(BaseChoice):
    """Complete answer of a dialogue."""

    message: dict[str, Any]
    logprobs: ChatLogprobs | None = None


class ChatDelta(BaseChoice):
    """Text that a chunk of a stream adds."""

    delta: dict[str, Any]
    logprobs: ChatLogprobs | None = None


class TextChoice(BaseChoice):
    """Text, or a chunk of it."""

    text: str
    logprobs: TextLogprobs | None = None


class GenerationResponse(BaseModel):
    """Response of /v1/chat/completions or /v1/completions, or one chunk of its stream."""

    id: str
    object: Literal["chat.completion", "chat.completion.chunk", "text_completion"]
    created: int
    model: str
    choices: list[ChatChoice] | list[ChatDelta] | list[TextChoice]
    usage: Usage | None = None
