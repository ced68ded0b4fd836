"""The think mask on real and synthetic tokenizers, compared with a plain implementation that decodes every prefix."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.qwen3_tokenizer import qwen3_tokenizer_dir
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rgsd.errors import ConfigError
from rgsd.prompts.thinking import prompt_opens_thinking, response_mask, strip_thinking

REPLACEMENT = "\ufffd"
CORPUS = [
    "ab ab<think>so ab\n</think>\n\nxy xy. <think>b</think>xyx",
    "The answer is xy.<think>The plan</think>The answer is yx",
    "ba</think>x yx😀<think>世界 ab</think>界🚀 y",
] * 20


def byte_level(regex: bool, vocab_size: int, added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE. Without the regex, merges cross word boundaries, so tags share tokens with other text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    if added:
        fast.add_tokens(list(added))
    return fast


def byte_fallback() -> PreTrainedTokenizerFast:
    """A sentencepiece-like BPE: spaces at a token's head, unknown characters as single bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁<>/abxythink.\n", "th", "▁<", "></", "▁x"]
    merges = [("t", "h"), ("▁", "<"), ("▁", "x")]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS: dict[str, PreTrainedTokenizerFast] = {
    "words": byte_level(regex=True, vocab_size=290),
    "over word edges": byte_level(regex=False, vocab_size=330),
    "merged whole": byte_level(regex=False, vocab_size=600),
    "bytes": byte_level(regex=False, vocab_size=257),
    "added tags": byte_level(regex=True, vocab_size=290, added=("<think>", "</think>")),
    "one added tag": byte_level(regex=True, vocab_size=290, added=("</think>",)),
    "byte fallback": byte_fallback(),
}


@pytest.fixture(params=list(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]


@pytest.fixture(scope="session")
def qwen3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    cache = getattr(request.config, "cache", None)
    folder = Path(cache.mkdir("tokenizers")) if cache else tmp_path_factory.mktemp("tokenizers")
    return AutoTokenizer.from_pretrained(qwen3_tokenizer_dir(folder))


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def kept(tokenizer: Any, ids: list[int], mask: list[bool]) -> str:
    return decode(tokenizer, [i for i, keep in zip(ids, mask, strict=True) if keep])


def masked(tokenizer: Any, ids: list[int], mask: list[bool]) -> str:
    return decode(tokenizer, [i for i, keep in zip(ids, mask, strict=True) if not keep])


# --- the plain implementation ---


def naive_spans(text: str, starts_in_thinking: bool) -> list[tuple[int, int]] | None:
    """Reasoning as character spans, read letter by letter; None when it is never closed."""
    spans, inside, start, at = [], starts_in_thinking, 0, 0
    while at < len(text):
        if text.startswith("<think>", at):
            start, inside = (start, True) if inside else (at, True)
            at += len("<think>")
        elif text.startswith("</think>", at):
            at += len("</think>")
            spans = [*spans, (start, at)] if inside else [(0, at)]
            inside = False
        else:
            at += 1
    return None if inside else spans


def naive_mask(ids: list[int], tokenizer: Any, starts_in_thinking: bool) -> list[bool]:
    """Decode every prefix, O(n^2), and drop the tokens whose characters touch a span."""
    # After a letter, for a sentencepiece decoder swallows a text's first space.
    lead = encode(tokenizer, "x")
    n_lead = len(decode(tokenizer, lead))
    spans = naive_spans(decode(tokenizer, lead + ids)[n_lead:], starts_in_thinking)
    if spans is None:
        return [False] * len(ids)
    mask, whole = [], 0
    for n in range(1, len(ids) + 1):
        prefix = decode(tokenizer, lead + ids[:n])[n_lead:]
        before, whole = whole, len(prefix.rstrip(REPLACEMENT))
        begun = whole + prefix.endswith(REPLACEMENT)
        mask.append(not any(before < end and begun > start for start, end in spans))
    return mask


THOUGHT = st.text(alphabet="ab 世😀\n", max_size=6)
ANSWER = st.text(alphabet="xy 界🚀\n<>/", max_size=6)


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(list(TOKENIZERS)),
    parts=st.lists(st.tuples(ANSWER, THOUGHT), max_size=4),
    last=ANSWER,
    first_thought=st.one_of(st.none(), THOUGHT),
    cut=st.booleans(),
)
def test_random_texts_agree_with_the_plain_implementation(
    name: str, parts: list[tuple[str, str]], last: str, first_thought: str | None, cut: bool
) -> None:
    tokenizer = TOKENIZERS[name]
    text = "" if first_thought is None else f"{first_thought}</think>"
    text += "".join(f"{answer}<think>{thought}</think>" for answer, thought in parts) + last
    text = f"{text}<think>a" if cut else text
    ids = encode(tokenizer, text)
    starts_in_thinking = first_thought is not None
    mask = response_mask(ids, tokenizer, starts_in_thinking=starts_in_thinking)

    assert mask == naive_mask(ids, tokenizer, starts_in_thinking)
    if cut:
        assert not any(mask)
        assert strip_thinking(text, starts_in_thinking=starts_in_thinking) == ""
        return
    thoughts = ([] if first_thought is None else [first_thought]) + [thought for _, thought in parts]
    assert not set("ab世😀") & set(kept(tokenizer, ids, mask))
    assert "think" not in kept(tokenizer, ids, mask)
    hidden = masked(tokenizer, ids, mask)
    for thought in thoughts:
        assert thought.strip() in hidden
    assert not set("ab世😀") & set(strip_thinking(text, starts_in_thinking=starts_in_thinking))


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(st.integers(0, 256), max_size=40), at=st.integers(0, 40), name=st.sampled_from(["words", "bytes"]))
def test_broken_bytes_never_raise_and_never_keep_a_tag(ids: list[int], at: int, name: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = [*ids[:at], *encode(tokenizer, "<think>a</think>"), *ids[at:]]
    mask = response_mask(ids, tokenizer)
    assert len(mask) == len(ids)
    assert "<think>" not in kept(tokenizer, ids, mask)


# --- the rules, one by one ---


def test_reasoning_is_dropped_and_the_answer_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tokenizer, "<think>ab</think>x y")
    mask = response_mask(ids, tokenizer)
    # A token that the close tag shares with the answer goes with the reasoning.
    assert "x y".endswith(kept(tokenizer, ids, mask))
    assert not mask[0]


def test_a_response_without_reasoning_is_kept_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tokenizer, "x y < think > 界🚀")
    assert response_mask(ids, tokenizer) == [True] * len(ids)
    assert response_mask([], tokenizer) == []


@pytest.mark.parametrize("text", ["<think>ab", "x<think>ab", "<think>a</think>x<think>b"])
def test_unclosed_reasoning_leaves_no_token(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = encode(tokenizer, text)
    assert response_mask(ids, tokenizer) == [False] * len(ids)


def test_opened_in_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tokenizer, "ab</think>x")
    mask = response_mask(ids, tokenizer, starts_in_thinking=True)
    assert not mask[0]
    assert "a" not in kept(tokenizer, ids, mask)
    ids = encode(tokenizer, "ab x")
    assert response_mask(ids, tokenizer, starts_in_thinking=True) == [False] * len(ids)


def test_an_open_tag_inside_reasoning_belongs_to_it(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tokenizer, "<think>a<think>b</think>xxx")
    mask = response_mask(ids, tokenizer)
    assert not set("ab") & set(kept(tokenizer, ids, mask))
    assert mask[-1]


def test_a_stray_close_tag_ends_reasoning_that_began_at_the_first_token(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = encode(tokenizer, "a<think>b</think>ba</think>xxx")
    mask = response_mask(ids, tokenizer)
    assert not set("ab") & set(kept(tokenizer, ids, mask))
    assert mask[-1]


def test_the_end_of_sequence_after_the_answer_stays() -> None:
    tokenizer = TOKENIZERS["words"]
    ids = [*encode(tokenizer, "<think>ab</think>"), tokenizer.eos_token_id]
    assert response_mask(ids, tokenizer) == [False] * (len(ids) - 1) + [True]


def test_a_token_shared_with_a_tag_is_dropped() -> None:
    tokenizer = TOKENIZERS["merged whole"]
    ids = encode(tokenizer, CORPUS[1])
    pieces = [decode(tokenizer, [i]) for i in ids]
    assert any(">" in piece and not piece.endswith(">") for piece in pieces), "the test needs a shared token"
    assert response_mask(ids, tokenizer) == naive_mask(ids, tokenizer, starts_in_thinking=False)


def test_a_tag_spelled_out_counts_where_the_tokenizer_has_it_as_one_token() -> None:
    tokenizer = TOKENIZERS["added tags"]
    spelled = [i for letter in "<think>" for i in encode(tokenizer, letter)]
    ids = [*spelled, *encode(tokenizer, "ab</think>x")]
    assert response_mask(ids, tokenizer) == [False] * (len(ids) - 1) + [True]


def test_characters_that_several_tokens_share_do_not_shift_the_mask() -> None:
    tokenizer = TOKENIZERS["bytes"]
    text = "<think>世界😀</think>界🚀"
    ids = encode(tokenizer, text)
    n_reasoning = len("<think>世界😀</think>".encode())
    assert len(ids) == len(text.encode())
    assert response_mask(ids, tokenizer) == [False] * n_reasoning + [True] * (len(ids) - n_reasoning)


def test_tags_that_are_not_ascii_are_found_to_the_byte() -> None:
    tokenizer = TOKENIZERS["bytes"]
    before, thought, after = "界", "◁think▷a◁/think▷", "🚀"
    ids = encode(tokenizer, before + thought + after)
    mask = response_mask(ids, tokenizer, open_tag="◁think▷", close_tag="◁/think▷")
    assert mask == [True] * 3 + [False] * len(thought.encode()) + [True] * 4


@pytest.mark.parametrize(("open_tag", "close_tag"), [("", "</t>"), ("<a b>", "</t>"), ("<t>", "<t>")])
def test_unusable_tags_are_refused(open_tag: str, close_tag: str) -> None:
    with pytest.raises(ConfigError, match="tag"):
        response_mask([1], TOKENIZERS["words"], open_tag=open_tag, close_tag=close_tag)
    with pytest.raises(ConfigError, match="tag"):
        strip_thinking("a", open_tag, close_tag)


# --- speed ---


def long_text(n: int) -> str:
    return "<think>" + "ab 世界 😀 so ab. " * n + "</think>" + "The answer is xy 界🚀. " * 50


def looping_text(n: int) -> str:
    return "<think>ab</think>x " * n


@pytest.mark.parametrize("text_of", [long_text, looping_text])
def test_thirty_thousand_tokens_take_under_two_seconds(
    tokenizer: PreTrainedTokenizerFast, text_of: Callable[[int], str]
) -> None:
    ids = encode(tokenizer, text_of(8000))[:30_000]
    if text_of is long_text:
        ids = [*ids, *encode(tokenizer, "</think> The answer is x")]
    assert len(ids) >= 15_000
    started = time.perf_counter()
    response_mask(ids, tokenizer)
    assert time.perf_counter() - started < 2.0


# --- stripping ---


@pytest.mark.parametrize(
    ("text", "starts_in_thinking", "answer"),
    [
        ("<think>a</think>\n\nx y\n", False, "x y"),
        (" x y\n", False, " x y\n"),
        ("a</think>x", True, "x"),
        ("a</think>x", False, "x"),
        ("<think>a</think>x <think>b</think>y", False, "x y"),
        ("x<think>a", False, ""),
        ("a", True, ""),
        ("<think>a</think>", False, ""),
    ],
)
def test_strip_thinking(text: str, starts_in_thinking: bool, answer: str) -> None:
    assert strip_thinking(text, starts_in_thinking=starts_in_thinking) == answer


# --- Qwen3's own tokenizer and chat template ---

TURN = [{"role": "user", "content": "What is <think>?"}]
# How Qwen3-Thinking-2507's template ends its generation prompt.
ALWAYS_THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def prompt_ids(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> list[int]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    return encode(tokenizer, text)


@pytest.mark.parametrize("options", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_qwen3_templates_leave_thinking_closed(qwen3: Any, options: dict[str, bool]) -> None:
    ids = prompt_ids(qwen3, TURN, **options)
    # With thinking off, the template closes an empty block; with it on, the model opens the block itself.
    ends = "<think>\n\n</think>\n\n" if options.get("enable_thinking") is False else "<|im_start|>assistant\n"
    assert decode(qwen3, ids).endswith(ends)
    assert not prompt_opens_thinking(ids, qwen3)


def test_a_template_that_ends_with_the_open_tag(qwen3: Any) -> None:
    ids = prompt_ids(qwen3, TURN, chat_template=ALWAYS_THINKS)
    assert prompt_opens_thinking(ids, qwen3)
    assert not prompt_opens_thinking(ids, qwen3, "<reason>")
    assert not prompt_opens_thinking([], qwen3)


def test_qwen3_response_from_the_first_tag_to_the_end(qwen3: Any) -> None:
    ids = encode(qwen3, "<think>\nThe rubric wants 世界 😀.\n</think>\n\nDrink water. 喝水 🚀<|im_end|>")
    mask = response_mask(ids, qwen3)
    assert kept(qwen3, ids, mask) == "\n\nDrink water. 喝水 🚀<|im_end|>"
    assert mask == naive_mask(ids, qwen3, starts_in_thinking=False)
    assert mask[-1]
    assert ids[-1] == qwen3.eos_token_id


def test_qwen3_response_whose_tag_the_prompt_opened(qwen3: Any) -> None:
    ids = encode(qwen3, "I plan.\n</think>\n\nDrink water.<|im_end|>")
    starts_in_thinking = prompt_opens_thinking(prompt_ids(qwen3, TURN, chat_template=ALWAYS_THINKS), qwen3)
    assert (
        kept(qwen3, ids, response_mask(ids, qwen3, starts_in_thinking=starts_in_thinking))
        == "\n\nDrink water.<|im_end|>"
    )
    cut = encode(qwen3, "I plan.")
    assert response_mask(cut, qwen3, starts_in_thinking=starts_in_thinking) == [False] * len(cut)


def test_qwen3_thirty_thousand_tokens(qwen3: Any) -> None:
    ids = encode(qwen3, "<think>" + "I plan the 世界 😀 carefully. " * 4000 + "</think>" + "Drink water. " * 200)
    assert len(ids) > 30_000
    started = time.perf_counter()
    mask = response_mask(ids, qwen3)
    assert time.perf_counter() - started < 2.0
    assert kept(qwen3, ids, mask) == "Drink water. " * 200
