"""The think-mask: which tokens of a response are reasoning, and which are the answer that the loss is taken on.

A reasoning model's teacher may speak of the rubric while it reasons, so only the final response is distilled (paper,
arXiv 2606.12507). What counts as a tag is decided on text, so that the mask and `strip_thinking` always agree, whether
the tokenizer holds the tag as one token, spells it in several, or lets it share a token with its neighbours.

The rules, for the mask and for the text alike:

- From an open tag to the next close tag, both included, is reasoning. An open tag inside reasoning is part of it.
- `opened=True`: the chat template opened the tag in the prompt, so reasoning begins at the first token.
- Reasoning that is never closed was cut off: the whole response contributes nothing, not even what precedes it.
- A close tag without an open one ends reasoning that began at the response's first token (models trained with a
  prefilled open tag write so): everything up to and including it is reasoning.
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
"""What a decoder writes for bytes that are not (yet) a whole UTF-8 character."""


@dataclass(frozen=True, slots=True)
class _Span:
    """From `start` up to, not including, `end`: in characters of a text or in tokens of a response."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class _Tag:
    """One tag found, and where: in characters or in tokens."""

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
    """Which tokens of a response are in the loss: the answer's, and an end-of-sequence token after it.

    Args:
        response_ids: the response's token ids, without the prompt's and without padding.
        tokenizer: the tokenizer that wrote them.
        open_tag: what opens reasoning.
        close_tag: what closes it.
        starts_in_thinking: whether the prompt ends inside an open tag, see `prompt_opens_thinking`.

    Returns:
        One bool a token. False for every token that overlaps reasoning or its tags by as much as one byte; all False
        when the reasoning is never closed.

    Raises:
        ConfigError: when a tag is empty or holds white space, or both are the same.
    """
    pattern = _tag_pattern(open_tag, close_tag)
    ids = list(response_ids)
    text_tags = _tags(_decode(tokenizer, ids), pattern, close_tag)
    token_tags = _single_token_tags(ids, tokenizer, open_tag, close_tag)
    if [t.closes for t in token_tags] == [t.closes for t in text_tags]:
        # Every tag of the text is one token of its own (or there is none): no alignment is needed.
        return _mask(len(ids), _reasoning(token_tags, starts_in_thinking))
    alignment = align(ids, tokenizer)
    aligned_tags = _tags(alignment.text, pattern, close_tag)
    spans = _reasoning(aligned_tags, starts_in_thinking)
    if spans is None or len(aligned_tags) != len(text_tags):
        # Only broken bytes decode to other tags in pieces than as a whole: no token is better than a wrong one.
        return [False] * len(ids)
    return _mask(len(ids), [alignment.tokens_of(span) for span in spans])


def prompt_opens_thinking(
    prompt_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, open_tag: str = OPEN_TAG
) -> bool:
    """Whether a prompt ends with the open tag, white space aside, so that the response begins inside reasoning.

    A tag earlier in the prompt (in the user's own text, or in an empty block that the template closed) does not count.
    """
    return _decode(tokenizer, list(prompt_ids)).rstrip().endswith(open_tag)


def strip_thinking(
    text: str, open_tag: str = OPEN_TAG, close_tag: str = CLOSE_TAG, starts_in_thinking: bool = False
) -> str:
    """The answer alone, for a judge to read: by the same rules as `response_mask`.

    Returns:
        The text unchanged when it holds no reasoning; "" when its reasoning is never closed; else what stands outside
        the reasoning, without white space at either end.

    Raises:
        ConfigError: when a tag is empty or holds white space, or both are the same.
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
        # White space at a token's edge can vanish in decoding, so such a tag could not be found reliably.
        if not tag or re.search(r"\s", tag):
            raise ConfigError(f"{name} must be a text without white space, got {tag!r}: write it as the model does")
    if open_tag == close_tag:
        raise ConfigError(f"open_tag and close_tag are both {open_tag!r}: give two different tags")
    # Longest first, should one tag begin with the other.
    return re.compile("|".join(re.escape(tag) for tag in sorted((open_tag, close_tag), key=len, reverse=True)))


def _tags(text: str, pattern: re.Pattern[str], close_tag: str) -> list[_Tag]:
    return [_Tag(m.group() == close_tag, _Span(m.start(), m.end())) for m in pattern.finditer(text)]


def _single_token_tags(ids: list[int], tokenizer: PreTrainedTokenizerBase, open_tag: str, close_tag: str) -> list[_Tag]:
    # Not every tokenizer class tells its added tokens apart; without them the tags are looked for in the text alone.
    added: dict[str, int] = getattr(tokenizer, "get_added_vocab", dict)()
    closes = {added[tag]: tag == close_tag for tag in (open_tag, close_tag) if tag in added}
    return [_Tag(closes[i], _Span(at, at + 1)) for at, i in enumerate(ids) if i in closes]


def _reasoning(tags: list[_Tag], starts_in_thinking: bool) -> list[_Span] | None:
    """The spans of reasoning, in the unit of `tags`; None when the last one is never closed."""
    spans: list[_Span] = []
    start = 0 if starts_in_thinking else None
    for tag in tags:
        if not tag.closes:
            start = tag.at.start if start is None else start
        elif start is None:
            spans = [_Span(0, tag.at.end)]
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
    """Decodes tokens as they read inside a text: after a letter, which some decoders need to keep a leading space."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._anchor: list[int] = list(tokenizer.encode("a", add_special_tokens=False))[-1:]
        self._lead = _decode(tokenizer, self._anchor)

    def __call__(self, ids: list[int]) -> str:
        text = _decode(self._tokenizer, self._anchor + ids)
        return text[len(self._lead) :] if text.startswith(self._lead) else _decode(self._tokenizer, ids)


@dataclass(frozen=True, slots=True)
class Alignment:
    """A response cut into segments that decode on their own: single tokens, or runs that share UTF-8 characters.

    Args:
        text: the segments' texts, joined.
        ids: the response's token ids.
        segment_chars: each segment's first character, ascending; its last entry is the text's length.
        segment_tokens: each segment's first token, ascending; its last entry is the number of tokens.
        decoder: decodes the tokens of a run.
    """

    text: str
    ids: list[int]
    segment_chars: list[int]
    segment_tokens: list[int]
    decoder: Decoder

    def tokens_of(self, span: _Span) -> _Span:
        """The tokens that hold at least one byte of these characters."""
        return _Span(self._first_token(span.start), self._last_token(span.end - 1) + 1)

    def token_texts(self) -> list[str]:
        """Each token's part of the text. Of tokens that share a character, the one that completes it has it."""
        texts: list[str] = []
        for segment in range(len(self.segment_tokens) - 1):
            run = self._run(segment)
            text = self.text[self.segment_chars[segment] : self.segment_chars[segment + 1]]
            # Bytes that never become a character go to the last token.
            ends = [*(min(self._n_whole(run[:n]), len(text)) for n in range(1, len(run))), len(text)]
            starts = [0, *ends]
            texts += [text[start:end] for start, end in zip(starts, ends, strict=False)]
        return texts

    def _first_token(self, char: int) -> int:
        segment = self._segment(char)
        run, char = self._run(segment), char - self.segment_chars[segment]
        n_before = bisect_left(range(len(run)), char, key=lambda n: self._n_whole(run[:n]))
        # The token that completes the character before may already hold the first byte of this one.
        shares = n_before > 0 and len(self.decoder(run[:n_before])) > char
        return self.segment_tokens[segment] + n_before - shares

    def _last_token(self, char: int) -> int:
        segment = self._segment(char)
        run, char = self._run(segment), char - self.segment_chars[segment]
        n_tokens = bisect_left(range(len(run)), char + 1, key=lambda n: self._n_whole(run[:n]))
        return self.segment_tokens[segment] + n_tokens - 1

    def _segment(self, char: int) -> int:
        # Among segments that begin at the same character, the last one holds it: the others decode to nothing.
        return bisect_right(self.segment_chars, char) - 1

    def _run(self, segment: int) -> list[int]:
        return self.ids[self.segment_tokens[segment] : self.segment_tokens[segment + 1]]

    def _n_whole(self, ids: list[int]) -> int:
        """Characters that these tokens complete."""
        return len(self.decoder(ids).rstrip(REPLACEMENT)) if ids else 0


def align(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Alignment:
    """Cut a response into segments. Decodes every distinct token once and every run once: linear in the length."""
    decoder = Decoder(tokenizer)
    piece = {i: decoder([i]) for i in dict.fromkeys(ids)}
    texts: list[str] = []
    segment_tokens: list[int] = []
    at = 0
    while at < len(ids):
        end = at + 1
        if REPLACEMENT in piece[ids[at]]:
            # Tokens that split a UTF-8 character read right only together.
            while end < len(ids) and REPLACEMENT in piece[ids[end]]:
                end += 1
        texts.append(piece[ids[at]] if end == at + 1 else decoder(ids[at:end]))
        segment_tokens.append(at)
        at = end
    segment_chars = [0]
    for text in texts:
        segment_chars.append(segment_chars[-1] + len(text))
    return Alignment("".join(texts), ids, segment_chars, [*segment_tokens, len(ids)], decoder)
