"""The think mask: which tokens of a response are reasoning, and which are the answer that the loss is computed on.

A reasoning model's teacher may mention the rubric while it reasons, so only the final response is distilled
(arXiv 2606.12507). Tags are found in the text rather than in the tokens. Mask and `strip_thinking` therefore always
agree, whether the tokenizer has one token for a tag, splits it into several, or merges its edges with its neighbors.

The rules, for tokens and text alike:

- Reasoning runs from an open tag to the next close tag, including both. An open tag inside reasoning is part of it.
- With `starts_in_thinking` the chat template has opened the tag in the prompt, so reasoning starts at the first token.
- Reasoning that is never closed was truncated, and the whole response is masked, even what precedes the reasoning.
- A close tag without an open one ends reasoning that started at the first token, as models write that were trained with
  a prefilled open tag. Everything up to and including it is reasoning.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from rgsd.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN_TAG = "<think>"
CLOSE_TAG = "</think>"

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that do not form a complete UTF-8 character, or not yet."""


@dataclass(frozen=True, slots=True)
class _Span:
    """A half-open range, from `start` to before `end`, of characters in a text or tokens in a response."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Tag:
    """A tag and its position, in characters or tokens."""

    closes: bool
    at: _Span


def response_mask(
    response_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    *,
    open_tag: str = OPEN_TAG,
    close_tag: str = CLOSE_TAG,
    starts_in_thinking: bool = False,
) -> list[bool]:
    """The tokens of a response that are in the loss: those of the answer, and an end-of-sequence token after it.

    Args:
        response_ids: The response's token ids, without prompt and padding.
        tokenizer: The tokenizer of the model that wrote them.
        open_tag, close_tag: The tags around the reasoning.
        starts_in_thinking: Whether the prompt ends inside an open tag (see `prompt_opens_thinking`).

    Returns:
        One bool per token. False for every token that overlaps reasoning or its tags by at least one byte, and for all
        tokens if the reasoning is never closed.

    Raises:
        ConfigError: If a tag is empty or contains white space, or both are the same.
    """
    pattern = _tag_pattern(open_tag, close_tag)
    ids = list(response_ids)
    text_tags = _tags(_decode(tokenizer, ids), pattern, close_tag)
    token_tags = _single_token_tags(ids, tokenizer, open_tag, close_tag)
    if [t.closes for t in token_tags] == [t.closes for t in text_tags]:
        # The common case: there is no tag, or each one is a single token, so characters need not be mapped to tokens.
        return _mask(len(ids), _reasoning(token_tags, starts_in_thinking))
    alignment = align(ids, tokenizer)
    aligned_tags = _tags(alignment.text, pattern, close_tag)
    spans = _reasoning(aligned_tags, starts_in_thinking)
    if spans is None or len(aligned_tags) != len(text_tags):
        # Either the reasoning is not closed, or broken bytes decode differently in segments than as a whole. Then it is
        # better to train on no token than on a wrong one.
        return [False] * len(ids)
    return _mask(len(ids), [alignment.tokens_of(span) for span in spans])


def prompt_opens_thinking(
    prompt_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, open_tag: str = OPEN_TAG
) -> bool:
    """Whether a prompt ends with the open tag, ignoring white space, so that the response starts inside reasoning.

    A tag earlier in the prompt, in the user's own text or in an empty block that the template closed, does not count.
    """
    return _decode(tokenizer, list(prompt_ids)).rstrip().endswith(open_tag)


def strip_thinking(
    text: str, open_tag: str = OPEN_TAG, close_tag: str = CLOSE_TAG, starts_in_thinking: bool = False
) -> str:
    """The answer without its reasoning, for a judge, by the same rules as `response_mask`.

    Args:
        text: The response.
        open_tag, close_tag: The tags around the reasoning.
        starts_in_thinking: Whether the prompt ends inside an open tag.

    Returns:
        The text unchanged if it has no reasoning, "" if its reasoning is never closed, and otherwise the text outside
        the reasoning, without surrounding white space.

    Raises:
        ConfigError: If a tag is empty or contains white space, or both are the same.
    """
    spans = _reasoning(_tags(text, _tag_pattern(open_tag, close_tag), close_tag), starts_in_thinking)
    if spans is None:
        return ""
    if not spans:
        return text
    starts = [0, *(span.end for span in spans)]
    ends = [*(span.start for span in spans), len(text)]
    return "".join(text[start:end] for start, end in zip(starts, ends, strict=True)).strip()


def _tag_pattern(open_tag: str, close_tag: str) -> re.Pattern[str]:
    for name, tag in (("open_tag", open_tag), ("close_tag", close_tag)):
        # Decoding can drop white space at the edges of tokens, so such a tag could not be found reliably.
        if not tag or re.search(r"\s", tag):
            raise ConfigError(
                f"{name} must be a non-empty text without white space, got {tag!r}: copy it from the model's output"
            )
    if open_tag == close_tag:
        raise ConfigError(f"open_tag and close_tag must differ, got {open_tag!r} for both")
    # Longest first, in case one tag starts with the other.
    return re.compile("|".join(re.escape(tag) for tag in sorted((open_tag, close_tag), key=len, reverse=True)))


def _tags(text: str, pattern: re.Pattern[str], close_tag: str) -> list[_Tag]:
    return [_Tag(m.group() == close_tag, _Span(m.start(), m.end())) for m in pattern.finditer(text)]


def _single_token_tags(ids: list[int], tokenizer: PreTrainedTokenizerBase, open_tag: str, close_tag: str) -> list[_Tag]:
    # Tokenizer classes without get_added_vocab have no known tag tokens, so their tags are found in the text alone.
    added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
    closes = {added[tag]: tag == close_tag for tag in (open_tag, close_tag) if tag in added}
    return [_Tag(closes[i], _Span(at, at + 1)) for at, i in enumerate(ids) if i in closes]


def _reasoning(tags: list[_Tag], starts_in_thinking: bool) -> list[_Span] | None:
    """The spans of reasoning, in the unit of `tags`, or None if the last one is never closed."""
    spans: list[_Span] = []
    start = 0 if starts_in_thinking else None
    for tag in tags:
        if not tag.closes:
            start = tag.at.start if start is None else start
        elif start is None:
            spans = [_Span(0, tag.at.end)]  # closes reasoning from the start, whatever was found before
        else:
            spans.append(_Span(start, tag.at.end))
            start = None
    return spans if start is None else None


def _mask(n_tokens: int, spans: list[_Span] | None) -> list[bool]:
    if spans is None:
        return [False] * n_tokens
    mask = [True] * n_tokens
    for span in spans:
        mask[span.start : span.end] = [False] * (span.end - span.start)
    return mask


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return cast(str, text)


class Decoder:
    """Decodes tokens as they appear inside a text.

    Some decoders drop a leading space at the start of a text, so the tokens are decoded after a letter.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._anchor: list[int] = list(tokenizer.encode("a", add_special_tokens=False))[-1:]
        self._lead = _decode(tokenizer, self._anchor)

    def __call__(self, ids: list[int]) -> str:
        text = _decode(self._tokenizer, self._anchor + ids)
        return text[len(self._lead) :] if text.startswith(self._lead) else _decode(self._tokenizer, ids)


@dataclass(frozen=True, slots=True)
class Alignment:
    """A response split into segments that decode on their own: single tokens, or runs that share UTF-8 characters.

    Args:
        text: The texts of the segments, joined.
        ids: The response's token ids.
        segment_chars: The first character of each segment, ascending, and the length of the text at the end.
        segment_tokens: The first token of each segment, ascending, and the number of tokens at the end.
        decoder: Decodes the tokens of a run.
    """

    text: str
    ids: list[int]
    segment_chars: list[int]
    segment_tokens: list[int]
    decoder: Decoder

    def tokens_of(self, span: _Span) -> _Span:
        """The tokens that contain at least one byte of these characters."""
        return _Span(self._first_token(span.start), self._last_token(span.end - 1) + 1)

    def token_texts(self) -> list[str]:
        """The text of each token. A character that several tokens share belongs to the one that completes it."""
        texts: list[str] = []
        for segment in range(len(self.segment_tokens) - 1):
            run = self._run(segment)
            text = self.text[self.segment_chars[segment] : self.segment_chars[segment + 1]]
            # Bytes that never form a character go to the last token.
            ends = [*(min(self._n_whole(run[:n]), len(text)) for n in range(1, len(run))), len(text)]
            starts = [0, *ends]
            texts += [text[start:end] for start, end in zip(starts, ends, strict=False)]
        return texts

    def _first_token(self, char: int) -> int:
        segment = self._segment(char)
        run, char = self._run(segment), char - self.segment_chars[segment]
        n_before = bisect_left(range(len(run)), char, key=lambda n: self._n_whole(run[:n]))
        # The token that completes the previous character may already contain the first byte of this one.
        shares = n_before > 0 and len(self.decoder(run[:n_before])) > char
        return self.segment_tokens[segment] + n_before - shares

    def _last_token(self, char: int) -> int:
        segment = self._segment(char)
        run, char = self._run(segment), char - self.segment_chars[segment]
        n_tokens = bisect_left(range(len(run)), char + 1, key=lambda n: self._n_whole(run[:n]))
        return self.segment_tokens[segment] + n_tokens - 1

    def _segment(self, char: int) -> int:
        # Of segments that start at the same character, the last one contains it: the others decode to nothing.
        return bisect_right(self.segment_chars, char) - 1

    def _run(self, segment: int) -> list[int]:
        return self.ids[self.segment_tokens[segment] : self.segment_tokens[segment + 1]]

    def _n_whole(self, ids: list[int]) -> int:
        """The number of characters that these tokens complete."""
        return len(self.decoder(ids).rstrip(REPLACEMENT)) if ids else 0


def align(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Alignment:
    """Split a response into segments, in linear time: each distinct token and each run is decoded once."""
    decoder = Decoder(tokenizer)
    piece = {i: decoder([i]) for i in dict.fromkeys(ids)}
    texts: list[str] = []
    segment_tokens: list[int] = []
    at = 0
    while at < len(ids):
        end = at + 1
        if REPLACEMENT in piece[ids[at]]:
            # Tokens that split a UTF-8 character decode correctly only together.
            while end < len(ids) and REPLACEMENT in piece[ids[end]]:
                end += 1
        texts.append(piece[ids[at]] if end == at + 1 else decoder(ids[at:end]))
        segment_tokens.append(at)
        at = end
    segment_chars = [0]
    for text in texts:
        segment_chars.append(segment_chars[-1] + len(text))
    return Alignment("".join(texts), ids, segment_chars, [*segment_tokens, len(ids)], decoder)
