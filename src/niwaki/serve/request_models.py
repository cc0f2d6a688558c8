"""Models of the requests of the OpenAI API that the server answers. Any other field is refused by name.

Some fields change an answer and are not supported: tools, penalties, several answers. Their only accepted value is the
one that changes nothing. Thus no request gets the answer of another request.

    request = ChatRequest.model_validate_json(body)
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_STOPS, MAX_LOGPROBS = 4, 20
NEUTRAL: tuple[Any, ...] = (None, [], {}, 0, 0.0, False, "none", "auto", {"type": "text"})
IGNORED = frozenset({"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"})
UNSUPPORTED = frozenset(
    {
        "frequency_penalty", "presence_penalty", "logit_bias", "tools", "tool_choice", "parallel_tool_calls",
        "functions", "function_call", "response_format", "modalities", "audio", "reasoning_effort", "verbosity",
        "prediction", "web_search_options", "suffix",
    }
)  # fmt: skip

Stop = Annotated[str, Field(min_length=1, max_length=256)]


class Strict(BaseModel):
    """Base model: unknown fields and loose types are errors."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False


class GenerationRequest(Strict):
    """Fields of both kinds of requests."""

    model: str = Field(max_length=512)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stop | list[Stop] | None = None
    max_tokens: int | None = Field(default=None, ge=0, le=2**31)
    n: Literal[1] | None = 1

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral(cls, given: Any) -> Any:
        """Drop the fields that do not change an answer. Other unknown fields stay, and are refused by name."""
        if not isinstance(given, dict):
            return given
        for name in ("chat_template", "chat_template_kwargs"):
            if name in given:
                raise ValueError(f"{name} is not accepted: templates come from the model's folder only")
        kept = {}
        for name, value in given.items():
            if name in UNSUPPORTED and not any(value == one and type(value) is type(one) for one in NEUTRAL):
                raise ValueError(f"{name} is not supported by this server: leave it out")
            if name not in UNSUPPORTED | IGNORED:
                kept[name] = value
        return kept

    @field_validator("n", mode="before")
    @classmethod
    def _one_answer(cls, given: Any) -> Any:
        if isinstance(given, int) and given != 1:
            raise ValueError(f"one answer per request, got n={given}: send the request several times")
        return given

    @field_validator("stop")
    @classmethod
    def _stop_list(cls, given: str | list[str] | None) -> list[str]:
        stops = [given] if isinstance(given, str) else given or []
        if len(stops) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop strings, got {len(stops)}")
        return stops

    @model_validator(mode="after")
    def _stream_options(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belong to stream=true")
        return self

    @property
    def stops(self) -> list[str]:
        """Return the strings that end an answer."""
        return list(self.stop or [])

    @property
    def usage_in_stream(self) -> bool:
        """Check that a stream ends with its token counts."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """Request of POST /v1/completions: one prompt, as text or as token ids.

    `add_special_tokens`: whether a text gets its beginning (as in vLLM). A rendered chat holds its own.
    """

    prompt: str | list[int]
    echo: bool | None = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: Literal[1] | None = None
    add_special_tokens: bool | None = True

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, given: Any) -> Any:
        """Replace a list of one prompt by that prompt."""
        several = isinstance(given, list) and bool(given) and isinstance(given[0], str | list)
        if several and len(given) != 1:
            raise ValueError(f"one prompt per request, got {len(given)}: send one request for each")
        return given[0] if several else given


class TextPart(Strict):
    """Part of a message. Only text is accepted, and no URL is fetched."""

    type: Literal["text"]
    text: str

    @field_validator("type", mode="before")
    @classmethod
    def _text_only(cls, given: Any) -> Any:
        if isinstance(given, str) and given != "text":
            raise ValueError(f"this server reads text only and fetches nothing, got a part of type {given[:40]!r}")
        return given


class Message(Strict):
    """Turn of a dialogue."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = Field(default=None, max_length=256)

    @property
    def plain(self) -> dict[str, str]:
        """Return the message as a template reads it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text} | ({} if self.name is None else {"name": self.name})


class ChatRequest(GenerationRequest):
    """Request of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(default=None, ge=0, le=2**31)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _consistent(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs belong to logprobs=true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens disagree: give one")
        return self

    @property
    def token_limit(self) -> int | None:
        """Return the largest number of tokens of the answer, None for the default."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
