"""How responses are sampled: one config that every generator takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rgsd.errors import ConfigError
from rgsd.prompts.thinking import CLOSE_TAG, OPEN_TAG


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """Sampling settings. The defaults decode greedily from the model's own distribution.

    Args:
        max_new_tokens: Longest response, in tokens.
        temperature: 0 decodes greedily. None leaves the temperature to a server that refuses the field.
        top_p: Sample from the most likely tokens that together have this probability.
        top_k: Sample from this many of the most likely tokens. 0 turns it off.
        min_p: Drop tokens less likely than this fraction of the most likely one. 0 turns it off.
        repetition_penalty: Divides the logits of tokens that already occur. 1 turns it off.
        seed: Combined with each prompt, so a response does not depend on the other prompts. None sends a server none.
        chat_template_kwargs: Arguments for the chat template, e.g. `{"enable_thinking": False}`.
        think_tags: The tags around reasoning. They stay in the text, even where they are special tokens.

    Raises:
        ConfigError: If a value is out of range.
    """

    max_new_tokens: int
    temperature: float | None = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = 0
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    think_tags: tuple[str, str] = (OPEN_TAG, CLOSE_TAG)

    def __post_init__(self) -> None:
        for name, is_valid, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature is None or self.temperature >= 0, "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("min_p", 0 <= self.min_p < 1, "at least 0 (off) and below 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0; 1 turns it off"),
        ):
            if not is_valid:
                raise ConfigError(f"{name} must be {expected}, got {getattr(self, name)}")

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    @property
    def filters(self) -> dict[str, float]:
        """The settings beyond temperature and top_p that differ from "off"."""
        neutral = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        return {name: getattr(self, name) for name, value in neutral.items() if getattr(self, name) != value}

    def identity(self) -> dict[str, Any]:
        """The settings that a response depends on, for its key.

        Filters that are off are left out, and so are the template's arguments, which the rendered prompt reflects.
        """
        return {
            "max_new_tokens": self.max_new_tokens,
            "top_p": self.top_p,
            "seed": self.seed,
            "tags": self.think_tags,
            **self.filters,
        }
