"""What every backend shares: the response, the protocol, seeds, and the prompts' checks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rgsd.errors import ConfigError, ModelError, PromptTooLong

Conversation = Sequence[Mapping[str, str]]
"""Messages, each with `role` and `content`."""

Done = Callable[[int, "Response"], None]
"""Called in the calling thread with a prompt's position and its response, as soon as that is there."""


@dataclass(frozen=True, slots=True)
class Response:
    """What a model wrote.

    Args:
        text: without the end of sequence; reasoning is in it, between its tags.
        n_tokens: its length in tokens, reasoning included. A server's own count, which mostly includes the end of
            sequence; ours does not.
        is_truncated: whether it was cut off before its end.
        starts_in_thinking: whether the prompt opened the reasoning, so that the text begins inside it.
    """

    text: str
    n_tokens: int
    is_truncated: bool
    starts_in_thinking: bool = False


@dataclass(frozen=True, slots=True)
class ResponseKey:
    """What a response depends on, as digests: another one in any of them is another response.

    Args:
        weights: the model's identity (`rgsd.models.identity`), as far as it can be known.
        settings: of generation.
        prompt: as sent: token ids, or the messages where a server renders them.
    """

    weights: str
    settings: str
    prompt: str


def response_keys(
    weights: str, settings: Mapping[str, Any], sent: Sequence[Any], temperature: float | None = 0.0
) -> list[ResponseKey]:
    """One key a prompt.

    Args:
        weights: the model's identity.
        settings: what the response depends on. Of greedy decoding seed and top-p are not.
        sent: the prompts, token ids or messages.
        temperature: 0 is greedy.
    """
    kept = {k: v for k, v in settings.items() if temperature != 0 or k not in ("seed", "top_p")}
    of_settings = digest({**kept, "temperature": temperature})
    return [ResponseKey(digest(weights), of_settings, digest(prompt)) for prompt in sent]


def digest(value: Any) -> str:
    """A digest of a JSON value, of 32 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Generator(Protocol):
    """Something that answers conversations."""

    name: str
    """For rows: the backend and the model, e.g. `transformers:owner/name`."""

    def generate(self, prompts: Sequence[Conversation], done: Done | None = None) -> list[Response]:
        """One response a prompt, in their order.

        Args:
            prompts: conversations that end with the user's turn.
            done: called with each position and response as soon as it is there, in this thread and in any order.

        Raises:
            RGSDError: when some prompt gets no response. Every response until then was passed to `done`, so that the
                caller asks again for the missing ones alone.
        """
        ...

    def keys(self, prompts: Sequence[Conversation]) -> list[ResponseKey]:
        """What the response to each prompt depends on, before any is generated: a stored response of the same key is
        the one that `generate` would give."""
        ...


def prompt_seed(seed: int, prompt: Conversation) -> int:
    """The seed of one prompt's response, from 0 to 2^31 - 1: depends on `seed` and the messages alone."""
    text = json.dumps([seed, [[m["role"], m["content"]] for m in prompt]], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "big") >> 1


def check_settings(max_new_tokens: int, temperature: float | None, top_p: float, batch_size: int = 1) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}, at least 1 is wanted")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, at least 1 is wanted")
    if temperature is not None and temperature < 0:
        raise ConfigError(f"temperature is {temperature}: 0 (greedy) or more is wanted")
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p is {top_p}: a share above 0, up to 1 (all words) is wanted")


def described(i: int, prompts: Sequence[Conversation]) -> str:
    """Which prompt, in words: its position in this call, and how its last message begins."""
    last = " ".join(prompts[i][-1]["content"].split()) if prompts[i] else ""
    return f"prompt {i + 1} of {len(prompts)} ({last[:60]!r}{' ...' if len(last) > 60 else ''})"


def tokenize(
    tokenizer: Any, prompts: Sequence[Conversation], chat_template_kwargs: Mapping[str, Any], model: str
) -> list[list[int]]:
    """The conversations as the model reads them, through the tokenizer's chat template.

    Raises:
        ModelError: when the template refuses one.
    """
    from jinja2 import TemplateError

    ids = []
    for i, prompt in enumerate(prompts):
        try:
            found = tokenizer.apply_chat_template(
                [dict(m) for m in prompt], add_generation_prompt=True, return_dict=False, **chat_template_kwargs
            )
        except TemplateError as error:
            raise ModelError(
                f"the chat template of {model} refuses {described(i, prompts)}: {error}. Use a template without a "
                "system message, or another chat template"
            ) from error
        ids.append(list(found))
    return ids


def check_lengths(
    lengths: Sequence[int], limit: int | None, max_new_tokens: int, prompts: Sequence[Conversation], model: str
) -> None:
    """Refuse prompts that leave no room in the context for the longest response. Nothing is ever cut.

    Raises:
        PromptTooLong: naming the longest prompt, its length, the limit, and what fits.
    """
    if limit is None or not lengths:
        return
    longest = max(range(len(lengths)), key=lambda i: lengths[i])
    n = lengths[longest]
    if n + max_new_tokens <= limit:
        return
    n_others = sum(length + max_new_tokens > limit for length in lengths) - 1
    others = f", and {n_others} more prompts are too long as well" if n_others else ""
    remedy = f"lower max_new_tokens to at most {limit - n:,}, or leave it out"
    if n >= limit:
        remedy = "leave it out, shorten it, or take a model with a longer context"
    raise PromptTooLong(
        f"{described(longest, prompts)} has {n:,} tokens and max_new_tokens is {max_new_tokens:,}, but the context of "
        f"{model} holds {limit:,}{others}: {remedy}. Prompts are refused, never cut"
    )


def decode(tokenizer: Any, ids: Sequence[int], tags: Sequence[str]) -> str:
    """Tokens as text without special tokens, except the tags of reasoning where these are special ones."""
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special}
    if not any(added[i].content in tags for i in special):
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))
    kept = [i for i in ids if i not in special or added[i].content in tags]
    return str(tokenizer.decode(kept, skip_special_tokens=False))
