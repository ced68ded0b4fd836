"""Replays a finished response through a policy: its tokens, which of them are in the loss, and their logits.

This is what training does with rollouts, for responses that are stored in a file.

Letters in names: N response tokens, V vocabulary entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rgsd.errors import PromptTooLong
from rgsd.inference import Response
from rgsd.prompts.thinking import CLOSE_TAG, OPEN_TAG, response_mask


@dataclass(frozen=True, slots=True)
class Replay:
    """A response as tokens.

    Args:
        ids: Token ids, with the end of sequence unless the response was truncated.
        in_loss: For each token, whether it is in the loss.
    """

    ids: list[int]
    in_loss: list[bool]


def replay(
    response: Response,
    tokenizer: Any,
    *,
    think_tags: tuple[str, str] = (OPEN_TAG, CLOSE_TAG),
    mask_thinking: bool = True,
) -> Replay:
    """Tokenize a response and mark the tokens in the loss. An empty response is a single end of sequence.

    Args:
        response: The response.
        tokenizer: The policy's tokenizer.
        think_tags: The tags around the reasoning.
        mask_thinking: Whether to exclude the reasoning from the loss.
    """
    ids = list(tokenizer(response.text, add_special_tokens=False)["input_ids"])
    if not response.is_truncated or not ids:
        ids.append(tokenizer.eos_token_id)
    if not mask_thinking:
        return Replay(ids, [True] * len(ids))
    open_tag, close_tag = think_tags
    mask = response_mask(
        ids, tokenizer, open_tag=open_tag, close_tag=close_tag, starts_in_thinking=response.starts_in_thinking
    )
    return Replay(ids, mask)


def prompt_ids(
    tokenizer: Any, messages: Sequence[Mapping[str, str]], chat_template_kwargs: Mapping[str, Any] | None = None
) -> list[int]:
    """The token ids of a conversation, up to the start of the model's response."""
    return list(
        tokenizer.apply_chat_template(
            [dict(m) for m in messages], add_generation_prompt=True, return_dict=False, **(chat_template_kwargs or {})
        )
    )


def logits(model: Any, prompt: list[int], response: list[int], example_id: str) -> Tensor:
    """(N, V): the logits that predict each token of the response, in the model's precision and on its device.

    Raises:
        PromptTooLong: If prompt and response exceed the model's positions.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and len(prompt) + len(response) > positions:
        raise PromptTooLong(
            f"prompt and response of example {example_id} have {len(prompt) + len(response):,} tokens, the model has "
            f"{positions:,} positions: use a shorter response (--max_new_tokens) or another example"
        )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ids = torch.tensor([prompt + response], device=model.device)
            # Logits at t predict token t + 1, so one more than the response is computed, and the last are dropped.
            return model(input_ids=ids, logits_to_keep=len(response) + 1).logits[0, :-1]
    finally:
        model.train(was_training)
