"""Answers from the events of a job, whole or as a stream, for chats and for texts.

answer = ChatAnswer(names, "small", logprobs=2)
reply = answer.whole("Hello", scored, "stop", Usage.of(5, 1))
"""

import time
import uuid
from collections.abc import Sequence
from typing import Any, Protocol

from niwaki.serve.response_models import (
    ChatChoice,
    ChatDelta,
    ChatLogprobs,
    ChatTokenLogprob,
    GenerationResponse,
    TextChoice,
    TextLogprobs,
    TopLogprob,
    Usage,
)
from niwaki.serve.sampling import TokenScore
from niwaki.serve.text import Detokenizer, TokenNames


class Answer(Protocol):
    """Interface of both kinds of answers."""

    def opening(self, prompt: Sequence[TokenScore]) -> GenerationResponse | None:
        """Return the first chunk of a stream, if there is one before the first token."""
        ...

    def chunk(self, text: str, scored: Sequence[TokenScore]) -> GenerationResponse:
        """Return the chunk of one token."""
        ...

    def closing(self, reason: str) -> GenerationResponse:
        """Return the chunk with the reason of the end."""
        ...

    def counts(self, usage: Usage) -> GenerationResponse:
        """Return the last chunk, with the token counts."""
        ...

    def whole(self, text: str, scored: Sequence[TokenScore], reason: str, usage: Usage) -> GenerationResponse:
        """Return the complete answer. `scored` starts with the prompt if the answer shows it."""
        ...


class ChatAnswer:
    """Answer in a dialogue."""

    def __init__(self, names: TokenNames, model: str, *, logprobs: bool) -> None:
        self.names, self.logprobs = names, logprobs
        self._about: dict[str, Any] = _about("chatcmpl", model)

    def opening(self, prompt: Sequence[TokenScore]) -> GenerationResponse:
        """Return a chunk with the role."""
        return self._reply([ChatDelta(delta={"role": "assistant", "content": ""})])

    def chunk(self, text: str, scored: Sequence[TokenScore]) -> GenerationResponse:
        """Return the chunk of one token."""
        return self._reply([ChatDelta(delta={"content": text}, logprobs=self._scores(scored))])

    def closing(self, reason: str) -> GenerationResponse:
        """Return the chunk with the reason of the end."""
        return self._reply([ChatDelta(delta={}, finish_reason=reason)])

    def counts(self, usage: Usage) -> GenerationResponse:
        """Return a chunk without a choice, with the token counts."""
        return GenerationResponse(**self._about, object="chat.completion.chunk", choices=[], usage=usage)

    def whole(self, text: str, scored: Sequence[TokenScore], reason: str, usage: Usage) -> GenerationResponse:
        """Return the answer as one message."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = ChatChoice(message=message, logprobs=self._scores(scored), finish_reason=reason)
        return GenerationResponse(**self._about, object="chat.completion", choices=[choice], usage=usage)

    def _reply(self, choices: list[ChatDelta]) -> GenerationResponse:
        return GenerationResponse(**self._about, object="chat.completion.chunk", choices=choices)

    def _scores(self, scored: Sequence[TokenScore]) -> ChatLogprobs | None:
        if not self.logprobs:
            return None
        content = []
        for one in scored:
            chosen = self._top_logprob(one.token, one.logprob or 0.0)
            likeliest = [self._top_logprob(*entry) for entry in one.top]
            content.append(ChatTokenLogprob(**chosen.model_dump(), top_logprobs=likeliest))
        return ChatLogprobs(content=content)

    def _top_logprob(self, token: int, logprob: float) -> TopLogprob:
        name, raw = self.names.of(token)
        return TopLogprob(token=name, logprob=_finite(logprob), bytes=None if raw is None else list(raw))


class TextAnswer:
    """Continuation of a text. With `echo` it starts with the prompt.

    `prompt_parts`: tokens of a beginning that the server added to the echoed text, and all tokens of the prompt. The
    former have no place in the text. Control tokens of the prompt stand in it, those of the answer do not.
    """

    def __init__(
        self, names: TokenNames, model: str, *, logprobs: bool, echo: str, prompt_parts: tuple[int, int] = (0, 0)
    ) -> None:
        self.names, self.logprobs, self.echo = names, logprobs, echo
        self._about: dict[str, Any] = _about("cmpl", model)
        self._detokenizer, self._offset = Detokenizer(names.tokenizer), 0
        self._verbatim = Detokenizer(names.tokenizer, control_tokens=True)
        self._added, self._prompt = prompt_parts
        self._seen = 0

    def opening(self, prompt: Sequence[TokenScore]) -> GenerationResponse | None:
        """Return the prompt, if the answer shows it."""
        return self.chunk(self.echo, prompt) if self.echo else None

    def chunk(self, text: str, scored: Sequence[TokenScore]) -> GenerationResponse:
        """Return the chunk of one token."""
        return self._reply(TextChoice(text=text, logprobs=self._scores(scored)))

    def closing(self, reason: str) -> GenerationResponse:
        """Return the chunk with the reason of the end."""
        return self._reply(TextChoice(text="", finish_reason=reason))

    def counts(self, usage: Usage) -> GenerationResponse:
        """Return a chunk without a choice, with the token counts."""
        return GenerationResponse(**self._about, object="text_completion", choices=[], usage=usage)

    def whole(self, text: str, scored: Sequence[TokenScore], reason: str, usage: Usage) -> GenerationResponse:
        """Return the answer as one text."""
        reply = self._reply(TextChoice(text=self.echo + text, logprobs=self._scores(scored), finish_reason=reason))
        reply.usage = usage
        return reply

    def _reply(self, choice: TextChoice) -> GenerationResponse:
        return GenerationResponse(**self._about, object="text_completion", choices=[choice])

    def _scores(self, scored: Sequence[TokenScore]) -> TextLogprobs | None:
        """Return the scores. The first token of a prompt has no score."""
        if not self.logprobs:
            return None
        scores = TextLogprobs()
        for one in scored:
            scores.tokens.append(self.names.of(one.token)[0])
            scores.token_logprobs.append(None if one.logprob is None else _finite(one.logprob))
            top = {self.names.of(token)[0]: _finite(logprob) for token, logprob in one.top}
            scores.top_logprobs.append(None if one.logprob is None else top)
            scores.text_offset.append(self._offset)
            self._offset += self._width(one.token)
        return scores

    def _width(self, token: int) -> int:
        """Return the characters of the text that end with this token."""
        self._seen += 1
        text = self._detokenizer.feed(token)
        if self._seen <= self._added:
            return 0
        return len(self._verbatim.feed(token) if self._seen <= self._prompt else text)


def _finite(logprob: float) -> float:
    """Return a finite number, because JSON has no infinity."""
    return max(logprob, -9999.0)


def _about(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
