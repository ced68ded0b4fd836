"""A written response, read again by a policy: its tokens, which of them are in the loss, and the logits that predict
them. What training does on rollouts, for responses that lie in a file.

Letters in names: N response tokens, V vocabulary.
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
    """A response as tokens, its end of sequence with it if it came to one, and which of them are in the loss."""

    ids: list[int]
    in_loss: list[bool]


def replay(
    response: Response,
    tokenizer: Any,
    *,
    think_tags: tuple[str, str] = (OPEN_TAG, CLOSE_TAG),
    mask_thinking: bool = True,
) -> Replay:
    """The tokens of a response's text. An empty response is its end alone."""
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
    """A conversation as the model reads it, up to where its response begins."""
    return list(
        tokenizer.apply_chat_template(
            [dict(m) for m in messages], add_generation_prompt=True, return_dict=False, **(chat_template_kwargs or {})
        )
    )


def logits(model: Any, prompt: list[int], response: list[int], example_id: str) -> Tensor:
    """(N, V): the logits that predict each token of the response, in the model's precision and on its device.

    Raises:
        PromptTooLong: when the model has no positions for both.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and len(prompt) + len(response) > positions:
        raise PromptTooLong(
            f"prompt and response of example {example_id} have {len(prompt) + len(response):,} tokens, the model has "
            f"{positions:,} positions: nothing is cut, so take a shorter response (--max_new_tokens) or another example"
        )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            ids = torch.tensor([prompt + response], device=model.device)
            # Logits at t predict token t + 1; the last ones predict nothing here.
            return model(input_ids=ids, logits_to_keep=len(response) + 1).logits[0, :-1]
    finally:
        model.train(was_training)
