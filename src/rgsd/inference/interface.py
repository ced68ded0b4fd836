"""What all backends share: the response and its key, the protocol, seeds, and checks of prompts."""

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
"""Receives a prompt's position and its response, in the calling thread, as soon as the response is complete."""


@dataclass(frozen=True, slots=True)
class Response:
    """A model's response.

    Args:
        text: Without the end of sequence. Reasoning is included, between its tags.
        n_tokens: Length in tokens, reasoning included. A server reports its own count, which usually includes the end
            of sequence; other backends leave it out.
        is_truncated: Whether generation hit the token limit.
        starts_in_thinking: Whether the prompt opened the reasoning, so the text starts inside it.
    """

    text: str
    n_tokens: int
    is_truncated: bool
    starts_in_thinking: bool = False


@dataclass(frozen=True, slots=True)
class ResponseKey:
    """Digests of what a response depends on. If one of them changes, so may the response.

    Args:
        weights: The model's identity (`rgsd.models.identity`), as far as it is known.
        settings: The generation settings.
        prompt: The prompt as sent: token ids, or messages if a server renders them.
    """

    weights: str
    settings: str
    prompt: str


def response_keys(
    weights: str, settings: Mapping[str, Any], sent: Sequence[Any], temperature: float | None = 0.0
) -> list[ResponseKey]:
    """One key for each prompt.

    Args:
        weights: The model's identity.
        settings: The generation settings. Greedy decoding ignores `seed` and `top_p`.
        sent: The prompts, as token ids or messages.
        temperature: 0 is greedy.
    """
    relevant = {k: v for k, v in settings.items() if temperature != 0 or k not in ("seed", "top_p")}
    settings_digest = digest({**relevant, "temperature": temperature})
    return [ResponseKey(digest(weights), settings_digest, digest(prompt)) for prompt in sent]


def digest(value: Any) -> str:
    """A digest of a JSON value: 32 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Generator(Protocol):
    """Answers conversations."""

    name: str
    """Names the backend and the model in rows, e.g. `transformers:owner/name`."""

    def generate(self, prompts: Sequence[Conversation], done: Done | None = None) -> list[Response]:
        """Generate one response per prompt.

        Args:
            prompts: Conversations that end with the user's turn.
            done: Called in this thread with each position and response as it completes, in any order.

        Returns:
            The responses, in the order of the prompts.

        Raises:
            RGSDError: If a prompt gets no response. `done` has received every response that completed, so the caller
                can retry the missing prompts alone.
        """
        ...

    def keys(self, prompts: Sequence[Conversation]) -> list[ResponseKey]:
        """The key of each prompt's response, known before generation.

        A stored response with the same key is the one that `generate` would return.
        """
        ...


def prompt_seed(seed: int | None, prompt: Conversation) -> int:
    """The seed of one prompt's response, from 0 to 2^31 - 1. Depends only on `seed` and the messages."""
    text = json.dumps([seed, [[m["role"], m["content"]] for m in prompt]], ensure_ascii=False)
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:4], "big") >> 1


def check_batch_size(batch_size: int) -> None:
    """Raise a ConfigError if the batch size is less than 1."""
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")


def described(i: int, prompts: Sequence[Conversation]) -> str:
    """A prompt's name in a message: its position and the start of its last turn."""
    last = " ".join(prompts[i][-1]["content"].split()) if prompts[i] else ""
    return f"prompt {i + 1} of {len(prompts)} ({last[:60]!r}{' ...' if len(last) > 60 else ''})"


def tokenize(
    tokenizer: Any, prompts: Sequence[Conversation], chat_template_kwargs: Mapping[str, Any], model: str
) -> list[list[int]]:
    """Render conversations with the tokenizer's chat template and return their token ids.

    Raises:
        ModelError: If the template refuses a conversation.
    """
    from jinja2 import TemplateError

    ids = []
    for i, prompt in enumerate(prompts):
        try:
            prompt_ids = tokenizer.apply_chat_template(
                [dict(m) for m in prompt], add_generation_prompt=True, return_dict=False, **chat_template_kwargs
            )
        except TemplateError as error:
            raise ModelError(
                f"the chat template of {model} refuses {described(i, prompts)}: {error}. Use a template without a "
                "system message, or another chat template"
            ) from error
        ids.append(list(prompt_ids))
    return ids


def check_lengths(
    lengths: Sequence[int], limit: int | None, max_new_tokens: int, prompts: Sequence[Conversation], model: str
) -> None:
    """Refuse prompts that leave too little room for the longest response. Prompts are never truncated.

    Raises:
        PromptTooLong: Names the longest prompt, its length, the limit and what would fit.
    """
    if limit is None or not lengths:
        return
    longest = max(range(len(lengths)), key=lambda i: lengths[i])
    n = lengths[longest]
    if n + max_new_tokens <= limit:
        return
    n_others = sum(length + max_new_tokens > limit for length in lengths) - 1
    others = f", and {n_others} more prompts are too long as well" if n_others else ""
    remedy = f"lower max_new_tokens to at most {limit - n:,}, or remove the prompt"
    if n >= limit:
        remedy = "remove or shorten the prompt, or use a model with a longer context"
    raise PromptTooLong(
        f"{described(longest, prompts)} has {n:,} tokens and max_new_tokens is {max_new_tokens:,}, but the context of "
        f"{model} holds {limit:,}{others}: {remedy}. Prompts are never truncated"
    )


def decode(tokenizer: Any, ids: Sequence[int], tags: Sequence[str]) -> str:
    """Decode tokens without special tokens, but keep the think tags if they are special tokens."""
    added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    special = {i for i, token in added.items() if token.special}
    if not any(added[i].content in tags for i in special):
        return str(tokenizer.decode(list(ids), skip_special_tokens=True))
    visible = [i for i in ids if i not in special or added[i].content in tags]
    return str(tokenizer.decode(visible, skip_special_tokens=False))
