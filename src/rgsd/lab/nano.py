"""The nano model: a Llama with two million parameters that knows the world and can follow a rubric in its prompt.

Its weights are shipped in the folder `model`. `pretrain` trains them from random weights on the conversations of
`conversations.py`; `nano_scores.py` measures the result.

Letters in names: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AddedToken,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    get_cosine_with_min_lr_schedule_with_warmup,
)

from rgsd.errors import ConfigError, RunError
from rgsd.lab.conversations import Conversation, Conversations, every_setting, example_of
from rgsd.lab.nano_scores import NanoScores, measure, versions
from rgsd.lab.vocabulary import KIND_NAMES, KINDS, MODIFIERS, QUESTIONS, THINK, TOPICS, plain_thoughts, rubric_thought
from rgsd.lab.world import PITFALL_WEIGHTS, WEIGHTS, Fact, World, states, tells
from rgsd.models import fingerprint, load_model, load_tokenizer, save_model
from rgsd.progress import say
from rgsd.prompts.messages import teacher_messages
from rgsd.prompts.thinking import CLOSE_TAG, OPEN_TAG

SECONDS_BETWEEN_LINES = 15.0


def model_folder() -> Path:
    """The folder of the shipped model: weights, tokenizer and scores."""
    return Path(str(files("rgsd") / "lab" / "model"))


# --- Tokenizer ------------------------------------------------------------------------------------------------------

PAD, UNKNOWN, END = "<pad>", "<unk>", "<end>"
ROLES = ("<system>", "<user>", "<assistant>")

# A token is a word or a punctuation mark together with the space before it, so decoding restores the exact text.
_TOKEN = r"\n+| ?\w+| ?[^\w\s]|\s"

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer for every text of the world: prompts, teacher prompts of each template, responses.

    Each think tag is one added token, which decoding keeps. Roles, end and padding are special tokens.
    """
    splitter = pre_tokenizers.Split(Regex(_TOKEN), "isolated")
    pieces = sorted({piece for text in _texts(world) for piece, _ in splitter.pre_tokenize_str(text)})
    words = [PAD, UNKNOWN, END, *ROLES, *pieces]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    core.pre_tokenizer = splitter
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=list(ROLES),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    for tag in (OPEN_TAG, CLOSE_TAG):
        tokenizer.add_tokens(AddedToken(tag, normalized=False, special=False))
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _texts(world: World) -> Iterator[str]:
    """Yield texts that together contain every token of a prompt, teacher prompt, reasoning or response of the world."""
    yield THINK
    for topic in TOPICS:
        yield from (question.format(topic=topic, modifier=m) for question in QUESTIONS for m in MODIFIERS)
        yield from (thought for m in MODIFIERS for thought in plain_thoughts(topic, m))
        yield states(world.fact(topic, KIND_NAMES[0])).text
    for kind in KINDS:
        for value in kind.values:
            sentence = Fact(TOPICS[0], kind.name, value).sentence
            yield f"{sentence} {sentence}"
        yield tells(TOPICS[0], kind.name, -1).text
        yield rubric_thought([kind.name, kind.name, kind.name])
    criteria = [states(fact, w) for fact, w in zip(world.facts(TOPICS[0]), (*WEIGHTS, *WEIGHTS), strict=False)]
    criteria = criteria[:9]  # Templates number the criteria, and every number must be a single digit.
    pitfalls = [states(world.myth(TOPICS[0], KIND_NAMES[0]), w) for w in PITFALL_WEIGHTS[:2]]
    pitfalls.append(tells(TOPICS[0], KIND_NAMES[0], PITFALL_WEIGHTS[2]))
    for shown in ([*criteria], [*criteria[:6], *pitfalls], pitfalls):
        example = example_of(TOPICS[0], MODIFIERS[0], QUESTIONS[0], shown, "The.", think=False)
        for settings in every_setting():
            yield from (message["content"] for message in teacher_messages(example, settings))


# --- Batches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right. `weights_BT` holds the weight of each token in the loss, from 0 to 1."""

    ids_BT: Tensor
    weights_BT: Tensor


POOL = 2048
"""Conversations that are drawn together. Their batches are shuffled, since they come sorted by length."""
LENGTH_STEP = 16
"""Rows are padded to a multiple of this. Kernels are compiled for each shape, so there should be few shapes."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A conversation as token ids, with each token's weight in the loss."""

    ids: list[int]
    weights: list[float]


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase, prompt_weight: float) -> Encoded:
    """Encode prompt, response and end token. Response tokens have weight 1, or 0 where they are not in the loss."""
    prompt: Any = tokenizer.apply_chat_template(conversation.messages, add_generation_prompt=True, return_dict=False)
    ids, weights = list(prompt), [prompt_weight] * len(prompt)
    for text, in_loss in (*conversation.response, (END, True)):
        part: Any = tokenizer.encode(text, add_special_tokens=False)
        ids += part
        weights += [float(in_loss)] * len(part)
    return Encoded(ids, weights)


def batches(
    conversations: Iterator[Conversation], tokenizer: Any, *, tokens: int, prompt_weight: float, seed: int
) -> Iterator[Batch]:
    """Yield endless shuffled batches of rows of similar length, with at most `tokens` tokens including padding."""
    rng = random.Random(f"batches {seed}")
    waiting: dict[int, list[Encoded]] = {}
    while True:
        full: list[Batch] = []
        for _ in range(POOL):
            row = encode(next(conversations), tokenizer, prompt_weight)
            length = -(-len(row.ids) // LENGTH_STEP) * LENGTH_STEP
            rows = waiting.setdefault(length, [])
            rows.append(row)
            if (len(rows) + 1) * length > tokens:
                full.append(_batch(rows, length, tokenizer.pad_token_id))
                rows.clear()
        rng.shuffle(full)
        yield from full


def _batch(rows: Sequence[Encoded], length: int, pad: int) -> Batch:
    return Batch(
        torch.tensor([row.ids + [pad] * (length - len(row.ids)) for row in rows]),
        torch.tensor([row.weights + [0.0] * (length - len(row.ids)) for row in rows]),
    )


# --- Pretraining ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pretraining:
    """Settings of the pretraining; the defaults are those of the shipped model.

    Args:
        seed: Seed of weights, conversations and batches.
        steps: Optimizer steps.
        batch_tokens: Tokens per step, with padding.
        prompt_weight: Weight of a prompt token in the loss, where a response token has weight 1. Prompts teach facts
            too, because rubrics state facts.
        learning_rate: Peak learning rate, reached after `warmup` steps and followed by a cosine decay to a twentieth.
        warmup: Steps of linear warmup.
        weight_decay: Weight decay of AdamW.
        layers, width, feed_forward, heads: Dimensions of the Llama.
    """

    seed: int = 0
    steps: int = 4000
    batch_tokens: int = 4096
    prompt_weight: float = 0.2
    learning_rate: float = 3e-3
    warmup: int = 200
    weight_decay: float = 0.01
    layers: int = 4
    width: int = 192
    feed_forward: int = 512
    heads: int = 6

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_tokens < 512:
            raise ConfigError(
                f"steps must be at least 1 and batch_tokens at least 512, got {self.steps} and {self.batch_tokens}: a "
                "conversation has up to 350 tokens"
            )


def new_model(tokenizer: PreTrainedTokenizerBase, settings: Pretraining) -> LlamaForCausalLM:
    """Build the model with random weights."""
    torch.manual_seed(settings.seed)
    vocabulary = tokenizer.get_vocab()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[PAD],
    )
    model = LlamaForCausalLM(config)
    # On a CPU and at these lengths, the backward pass of torch's fused attention takes twice as long as eager's.
    model.set_attn_implementation("eager")
    return model


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of a pretraining.

    Args:
        loss: Mean over the last 100 steps, in nats per response token.
        tokens: Tokens read, with padding.
    """

    loss: float
    tokens: int


def train_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, world: World, settings: Pretraining
) -> Trained:
    """Pretrain the model in place, and print a line every 15 seconds."""
    stream = batches(
        iter(Conversations(world, settings.seed)),
        tokenizer,
        tokens=settings.batch_tokens,
        prompt_weight=settings.prompt_weight,
        seed=settings.seed,
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, settings.warmup, settings.steps, min_lr_rate=0.05)
    started = last_line = time.monotonic()
    losses: list[float] = []
    tokens = 0
    model.train()
    for step in range(1, settings.steps + 1):
        batch = next(stream)
        with torch.autocast("cpu", torch.bfloat16, enabled=_has_bf16()):
            # No attention mask: padding is on the right, where causal attention hides it from all other tokens.
            logits_BTV = model(input_ids=batch.ids_BT, use_cache=False).logits
        # Logits at t predict token t + 1.
        targets_N, weights_N = batch.ids_BT[:, 1:].flatten(), batch.weights_BT[:, 1:].flatten()
        nats_N = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), targets_N, reduction="none")
        loss = (nats_N * weights_N).sum() / weights_N.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(nats_N.detach()[weights_N == 1].mean().item())
        tokens += batch.ids_BT.numel()
        now = time.monotonic()
        if now - last_line >= SECONDS_BETWEEN_LINES or step == settings.steps:
            last_line = now
            recent = losses[-100:]
            left = (now - started) / step * (settings.steps - step)
            say(
                f"  step {step}/{settings.steps}: loss {sum(recent) / len(recent):.4f} nats, "
                f"{tokens / (now - started):,.0f} tokens/s, about {left:.0f} s left"
            )
    model.eval()
    recent = losses[-100:]
    return Trained(sum(recent) / len(recent), tokens)


def _has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware. Without that, autocast would make training slower."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def pretrain(
    output_dir: str | Path,
    *,
    seed: int = 0,
    steps: int | None = None,
    world: World | None = None,
    n_prompts: int | None = None,
) -> NanoScores:
    """Pretrain the nano model, and write its weights in bf16, its tokenizer and its scores.

    Args:
        output_dir: A folder that does not exist or is empty.
        seed: Seed of weights, conversations and batches.
        steps: Optimizer steps; by default as many as for the shipped model.
        world: The world whose facts it learns; by default the shipped model's.
        n_prompts: Number of held-out prompts to measure on; by default all, as for the shipped scores.

    Raises:
        RunError: If `output_dir` is not empty.
        ConfigError: If `steps` is less than one.
    """
    target, world = Path(output_dir), world or World()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise RunError(f"{target} exists and is not an empty folder: choose another output_dir")
    settings = Pretraining(seed=seed) if steps is None else Pretraining(seed=seed, steps=steps)
    started = time.monotonic()
    tokenizer = build_tokenizer(world)
    model = new_model(tokenizer, settings)
    n_parameters = sum(p.numel() for p in model.parameters())
    say(f"Pretraining: {n_parameters:,} parameters, {len(tokenizer)} tokens in the vocabulary, {settings.steps} steps")
    trained = train_model(model, tokenizer, world, settings)
    model.set_attn_implementation("sdpa")
    save_model(model.to(torch.bfloat16), tokenizer, target)  # pyright: ignore[reportArgumentType]
    seconds = time.monotonic() - started
    say("Measuring on the held-out prompts")
    # Measured after loading the file, because rounding to bf16 is part of the model.
    stored = load_model(str(target))
    scores = NanoScores(
        arms=measure(stored, load_tokenizer(str(target)), world, n_prompts=n_prompts),
        n_prompts=len(world.examples("held-out")[:n_prompts]),
        world=world.digest(),
        model_fingerprint=fingerprint(stored),
        n_parameters=n_parameters,
        pretraining=asdict(settings),
        loss=trained.loss,
        tokens=trained.tokens,
        seconds=round(seconds, 1),
        versions=versions(),
    )
    scores.write(target)
    return scores
