"""From the events of a job to an answer, whole or as a stream, for chats and for texts.

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
    ChatToken,
    Reply,
    Rival,
    TextChoice,
    TextLogprobs,
    Usage,
)
from niwaki.serve.sampling import Scored
from niwaki.serve.text import Detokenizer, Names


class Answer(Protocol):
    """What a route needs of both kinds."""

    def opening(self, prompt: Sequence[Scored]) -> Reply | None:
        """The first piece of a stream, if one comes before the first token."""
        ...

    def piece(self, text: str, scored: Sequence[Scored]) -> Reply:
        """What a token adds."""
        ...

    def closing(self, reason: str) -> Reply:
        """Why it ends."""
        ...

    def counts(self, usage: Usage) -> Reply:
        """The last piece, for those who asked for counts."""
        ...

    def whole(self, text: str, scored: Sequence[Scored], reason: str, usage: Usage) -> Reply:
        """All at once; `scored` begins with the prompt where that is shown."""
        ...


class ChatAnswer:
    """An answer in a dialogue."""

    def __init__(self, names: Names, model: str, *, logprobs: bool) -> None:
        self.names, self.logprobs = names, logprobs
        self._about: dict[str, Any] = _about("chatcmpl", model)

    def opening(self, prompt: Sequence[Scored]) -> Reply:
        """Who speaks."""
        return self._chunk([ChatDelta(delta={"role": "assistant", "content": ""})])

    def piece(self, text: str, scored: Sequence[Scored]) -> Reply:
        """What a token adds."""
        return self._chunk([ChatDelta(delta={"content": text}, logprobs=self._scores(scored))])

    def closing(self, reason: str) -> Reply:
        """Why it ends."""
        return self._chunk([ChatDelta(delta={}, finish_reason=reason)])

    def counts(self, usage: Usage) -> Reply:
        """No choice, only counts."""
        return Reply(**self._about, object="chat.completion.chunk", choices=[], usage=usage)

    def whole(self, text: str, scored: Sequence[Scored], reason: str, usage: Usage) -> Reply:
        """One message."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = ChatChoice(message=message, logprobs=self._scores(scored), finish_reason=reason)
        return Reply(**self._about, object="chat.completion", choices=[choice], usage=usage)

    def _chunk(self, choices: list[ChatDelta]) -> Reply:
        return Reply(**self._about, object="chat.completion.chunk", choices=choices)

    def _scores(self, scored: Sequence[Scored]) -> ChatLogprobs | None:
        if not self.logprobs:
            return None
        content = []
        for one in scored:
            chosen = self._rival(one.token, one.logprob or 0.0)
            rivals = [self._rival(*rival) for rival in one.top]
            content.append(ChatToken(**chosen.model_dump(), top_logprobs=rivals))
        return ChatLogprobs(content=content)

    def _rival(self, token: int, logprob: float) -> Rival:
        name, found = self.names.of(token)
        return Rival(token=name, logprob=_finite(logprob), bytes=None if found is None else list(found))


class TextAnswer:
    """A text that goes on; with `echo` it begins with the prompt."""

    def __init__(self, names: Names, model: str, *, logprobs: bool, echo: str) -> None:
        self.names, self.logprobs, self.echo = names, logprobs, echo
        self._about: dict[str, Any] = _about("cmpl", model)
        self._words, self._offset = Detokenizer(names.tokenizer), 0

    def opening(self, prompt: Sequence[Scored]) -> Reply | None:
        """The prompt, if it is to be shown."""
        return self.piece(self.echo, prompt) if self.echo else None

    def piece(self, text: str, scored: Sequence[Scored]) -> Reply:
        """What a token adds."""
        return self._reply(TextChoice(text=text, logprobs=self._scores(scored)))

    def closing(self, reason: str) -> Reply:
        """Why it ends."""
        return self._reply(TextChoice(text="", finish_reason=reason))

    def counts(self, usage: Usage) -> Reply:
        """No choice, only counts."""
        return Reply(**self._about, object="text_completion", choices=[], usage=usage)

    def whole(self, text: str, scored: Sequence[Scored], reason: str, usage: Usage) -> Reply:
        """One text."""
        reply = self._reply(TextChoice(text=self.echo + text, logprobs=self._scores(scored), finish_reason=reason))
        reply.usage = usage
        return reply

    def _reply(self, choice: TextChoice) -> Reply:
        return Reply(**self._about, object="text_completion", choices=[choice])

    def _scores(self, scored: Sequence[Scored]) -> TextLogprobs | None:
        """Tokens without a score (the first of a prompt) have none here either."""
        if not self.logprobs:
            return None
        found = TextLogprobs()
        for one in scored:
            found.tokens.append(self.names.of(one.token)[0])
            found.token_logprobs.append(None if one.logprob is None else _finite(one.logprob))
            top = {self.names.of(token)[0]: _finite(logprob) for token, logprob in one.top}
            found.top_logprobs.append(None if one.logprob is None else top)
            found.text_offset.append(self._offset)
            self._offset += len(self._words.feed(one.token))
        return found


def _finite(logprob: float) -> float:
    """JSON has no infinity."""
    return max(logprob, -9999.0)


def _about(kind: str, model: str) -> dict[str, Any]:
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
