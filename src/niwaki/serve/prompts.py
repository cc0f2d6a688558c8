"""Tokens of the prompt of a request, or a refusal that says what is wrong.

prompts = PromptTokenizer(tokenizer, vocabulary=32000, context=2048)
ids = prompts.tokenize_chat(messages)
"""

from collections.abc import Sequence
from typing import Any

from niwaki.data.bos import Bos, find_bos
from niwaki.data.chat import encode_chat, mark_messages
from niwaki.data.rendering import DialogueRefusedError, Renderer, RendererStartError, TemplateLimitError
from niwaki.serve.http.api_errors import INTERNAL, RefusalError
from niwaki.serve.request_models import Message


class PromptTokenizer:
    """Tokenizer and chat template of one model."""

    def __init__(self, tokenizer: Any, *, vocabulary: int, context: int) -> None:
        self.tokenizer, self.vocabulary, self.context = tokenizer, vocabulary, context
        self.bos = find_bos(tokenizer)
        self.renderer = None
        if tokenizer.chat_template:
            self.renderer = Renderer(tokenizer.get_chat_template(), dict(tokenizer.special_tokens_map))

    def tokenize_text(self, prompt: str | Sequence[int], *, begin: bool = True) -> list[int]:
        """Return the tokens of a text, with its beginning (`data.bos`) once unless told otherwise.

        Return ids unchanged.
        """
        if isinstance(prompt, str):
            bos = self.bos if begin else Bos()
            return [int(token) for token in bos.encode(self.tokenizer, prompt)]
        wrong = next((token for token in prompt if not 0 <= token < self.vocabulary), None)
        if wrong is not None:
            raise RefusalError(400, f"token ids lie between 0 and {self.vocabulary - 1}, got {wrong}", param="prompt")
        return list(prompt)

    def added(self, prompt: str | Sequence[int], ids: Sequence[int]) -> int:
        """Return how many of the first `ids` are a beginning that the text `prompt` does not hold itself."""
        count = len(self.bos.ids)
        if not isinstance(prompt, str) or not count or tuple(ids[:count]) != self.bos.ids:
            return 0
        return 0 if tuple(self.tokenize_text(prompt, begin=False)[:count]) == self.bos.ids else count

    def decode(self, ids: Sequence[int]) -> str:
        """Return ids as text."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def tokenize_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a dialogue. Names of control tokens in a message are plain text."""
        if self.renderer is None:
            raise RefusalError(400, "this model has no chat template: use /v1/completions", code="no_chat_template")
        marked = mark_messages([message.plain for message in messages], self.tokenizer)
        try:
            text = self.renderer.render(marked)
        except DialogueRefusedError as error:
            raise RefusalError(400, str(error), param="messages") from error
        except TemplateLimitError as error:
            raise RefusalError(400, str(error)) from error
        except RendererStartError as error:
            raise RefusalError(500, str(error), kind=INTERNAL) from error
        return encode_chat(text, self.tokenizer)

    def close(self) -> None:
        """End the process that renders."""
        if self.renderer is not None:
            self.renderer.close()

    def token_limit(self, ids: list[int], wanted: int | None) -> int:
        """Return the max tokens of the answer to a prompt. Raise RefusalError if both exceed the context."""
        if not ids:
            raise RefusalError(400, "the prompt is empty: give at least one token", param="prompt")
        room = self.context - len(ids)
        if room < (1 if wanted is None else wanted):
            request = "" if wanted is None else f" and max_tokens {wanted}"
            raise RefusalError(
                400, f"the context holds {self.context} tokens, the prompt has {len(ids)}{request}",
                code="context_length_exceeded",
            )  # fmt: skip
        return room if wanted is None else wanted
