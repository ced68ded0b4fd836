"""Batched decoding on a CPU: the model's own forward pass, with a loop, a cache and linear layers made for it.

What differs from transformers' `generate`:

- Keys and values are written in place, so the cache is never copied to grow by one token.
- A sequence that has ended leaves the batch, and a waiting prompt takes its place.
- Tokens are sampled by `sampling.pick_scored`, and linear layers are `linears.packed`, with LoRA included.
- Prompts are prefilled in groups of similar length.

Greedy tokens equal those of transformers, and sampled ones have the same distribution. `generate` covers only what is
known to be correct, and returns None for the rest, which transformers must then do.

Letters in names: B rows, L layers, T tokens, V vocabulary entries.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicLayer, GenerationConfig, GenerationMixin

from rgsd.models.adapters import base_network
from rgsd.models.batching import partition
from rgsd.models.kernels import is_on
from rgsd.models.kernels.linears import can_merge, packed
from rgsd.models.kernels.sampling import Sampling, pick_scored

INITIAL_ROOM = 128
"""Response tokens for which the cache has room at first."""
PREFILL_GROUPS = 4
"""Number of groups by length in which prompts are prefilled."""
REFILL_SHARE = 8
"""Waiting prompts are prefilled once 1 / REFILL_SHARE of the rows is free: a pass over few tokens still reads all
weights."""

_USED = frozenset({"max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p"})
"""Options of a generation config that `decoding_settings` interprets."""
_HARMLESS = frozenset(
    {"eos_token_id", "pad_token_id", "bos_token_id", "transformers_version", "disable_compile", "compile_config"}
)
"""Options that may be set too: the first is interpreted, the others change nothing here."""


@dataclass(frozen=True, slots=True)
class DecodingSettings:
    """The settings of `decode`.

    Args:
        sampling: How to sample tokens.
        end_tokens: The ids that end a response.
        max_new_tokens: The maximum length of a response.
    """

    sampling: Sampling
    end_tokens: tuple[int, ...]
    max_new_tokens: int


def decoding_settings(model: Any, config: GenerationConfig) -> DecodingSettings | None:
    """The settings with which `decode` does what `model.generate(generation_config=config)` would do.

    As in transformers, the checkpoint's own settings fill options that `config` leaves unset.

    Returns:
        None if some option is more than `decode` supports.
    """
    network = base_network(model)
    resolved = network._prepare_generation_config(config)[0]
    neutral = {**GenerationConfig().to_dict(), **GenerationConfig._get_default_generation_params()}
    for name, value in resolved.to_dict().items():
        is_known = name in _USED or name in _HARMLESS or name.startswith("_")
        # transformers treats these values as "option not set", so they change nothing.
        is_unset = value is None or value == neutral.get(name) or (value is False and not neutral.get(name))
        if not (is_known or is_unset):
            return None
    # Then the length is limited by max_length, prompt included, which differs from row to row.
    if not resolved.max_new_tokens:
        return None
    ends = resolved.eos_token_id if isinstance(resolved.eos_token_id, list) else [resolved.eos_token_id]
    if resolved.do_sample:
        if not resolved.temperature:
            return None
        sampling = Sampling(resolved.temperature, resolved.top_p or 1.0, resolved.top_k or 0, resolved.min_p or 0.0)
    else:
        sampling = Sampling(0.0)
    return DecodingSettings(sampling, tuple(e for e in ends if e is not None), resolved.max_new_tokens)


def covers(model: nn.Module) -> bool:
    """Whether `decode` supports the model.

    It must be on a CPU, a causal transformer with plain attention over the full past, with transformers' own `generate`
    and no adapters other than plain LoRA.
    """
    network: Any = base_network(model)
    if not (is_on() and issubclass(type(network), GenerationMixin)):
        return False
    if any(p.device.type != "cpu" for p in network.parameters()):
        return False
    config = network.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    # A model class that overrides one of these decodes in its own way.
    replaced = ("generate", "prepare_inputs_for_generation", "_prepare_cache_for_generation", "_sample")
    return (
        all(getattr(type(network), n) is getattr(GenerationMixin, n) and n not in vars(network) for n in replaced)
        and bool(getattr(network, "_supports_attention_backend", False))
        and config._attn_implementation in ("sdpa", "eager")
        and not (config.is_encoder_decoder or getattr(network, "_is_stateful", False))
        # Sliding windows would need a cache that forgets.
        and all(kind == "full_attention" for kind in kinds)
        and not (getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True))
        and not getattr(network, "is_quantized", False)
        and all(type(p) in (Tensor, nn.Parameter) and p.is_floating_point() for p in network.parameters())
        and can_merge(model)
    )


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    scored: Callable[[int, list[float]], None] | None = None,
) -> list[list[int]] | None:
    """Generate a response to each prompt, as `model.generate` would, with draws from torch's global generator.

    Args:
        model: The model.
        prompts: Token ids.
        config: The settings, as for transformers.
        scored: Called with the index of a prompt and the log-probability of each of its response tokens, in nats.

    Returns:
        The response tokens, including the end token if there is one. None if the model or a setting is not supported.
    """
    settings = decoding_settings(model, config) if prompts and covers(model) else None
    if settings is None:
        return None
    draws_BT = torch.empty(0)
    if not settings.sampling.is_greedy:
        # All draws at once, so that they do not depend on the order in which rows end.
        draws_BT = torch.rand(len(prompts), settings.max_new_tokens, dtype=torch.float64)
    with ready(model, len(prompts)):
        return decode(model, prompts, settings, rows=len(prompts), draws=lambda i: draws_BT[i], scored=scored)


@contextmanager
def ready(model: nn.Module, rows: int) -> Iterator[None]:
    """Prepare a model for `decode` inside the context: eval mode, and linear layers packed for this many rows.

    Under autocast they multiply in its dtype.
    """
    was_training = model.training
    model.eval()
    low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    try:
        with packed(model, rows, low):
            yield
    finally:
        model.train(was_training)


@torch.no_grad()
def decode(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    settings: DecodingSettings,
    *,
    rows: int,
    draws: Callable[[int], Tensor],
    done: Callable[[int, list[int]], None] | None = None,
    limits: Sequence[int] | None = None,
    scored: Callable[[int, list[float]], None] | None = None,
) -> list[list[int]]:
    """Generate the new tokens of each prompt, up to and including an end token.

    Args:
        model: A model that `covers` accepts, inside `ready`.
        prompts: Token ids, at least one per prompt.
        settings: The settings.
        rows: Sequences per batch. When some have ended, the next prompts take their places, shortest first.
        draws: Returns the draws of a prompt: uniform numbers from [0, 1) in float64, one per token. Not called for
            greedy sampling.
        done: Called with the index of a prompt and its new tokens, as soon as they are complete.
        limits: The maximum length of each prompt's response, in place of `settings.max_new_tokens`.
        scored: Called with the index of a prompt and the log-probability of each new token, in nats.

    Returns:
        The new tokens, in the order of the prompts.
    """
    rows = min(rows, len(prompts))
    batch = _Batch(base_network(model), settings, rows)
    # Shortest first: neighbours have similar lengths, so a prefill pads little.
    waiting = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
    responses: list[list[int]] = [[] for _ in prompts]
    while waiting or batch.n_live:
        n_free = rows - batch.n_live
        if waiting and n_free >= min(max(1, rows // REFILL_SHARE), len(waiting)):
            indices = [waiting.popleft() for _ in range(min(n_free, len(waiting)))]
            new = [_Row(i, settings.max_new_tokens if limits is None else limits[i]) for i in indices]
            batch.prefill(new, [prompts[i] for i in indices], draws)
        else:
            batch.step(shrink=not waiting)  # while prompts wait, free rows are soon filled again
        for row in batch.take_ended():
            responses[row.prompt] = row.tokens
            if scored is not None:
                scored(row.prompt, row.log_ps)
            if done is not None:
                done(row.prompt, row.tokens)
    return responses


@dataclass(slots=True)
class _Row:
    """A sequence in progress.

    Args:
        prompt: The index of its prompt.
        limit: The maximum number of new tokens.
        tokens, log_ps: The new tokens so far, and the log-probability of each.
    """

    prompt: int
    limit: int
    tokens: list[int] = field(default_factory=list)
    log_ps: list[float] = field(default_factory=list)


class _Batch:
    """Sequences that are decoded together, each in its own row and at its own position."""

    def __init__(self, network: Any, settings: DecodingSettings, rows: int) -> None:
        self.network, self.settings = network, settings
        self.end_tokens = frozenset(settings.end_tokens)
        self.rows: list[_Row | None] = [None] * rows
        self.ended: list[_Row] = []
        self.cache = _Cache(rows)
        self.token_B = torch.zeros(rows, dtype=torch.long)
        is_greedy, columns = settings.sampling.is_greedy, settings.max_new_tokens
        self.draws_BT = None if is_greedy else torch.zeros(rows, columns, dtype=torch.float64)
        self.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else network.dtype
        self.options: dict[str, Any] = {"use_cache": True}
        # Only the last position predicts the next token. Without this option all positions are projected.
        if "logits_to_keep" in inspect.signature(network.forward).parameters:
            self.options["logits_to_keep"] = 1

    @property
    def n_live(self) -> int:
        return sum(row is not None for row in self.rows)

    def take_ended(self) -> list[_Row]:
        ended, self.ended = self.ended, []
        return ended

    def prefill(self, rows: list[_Row], prompts: list[Sequence[int]], draws: Callable[[int], Tensor]) -> None:
        """Prefill prompts, sorted by length, into free rows, and sample the first token of each."""
        free = [place for place, row in enumerate(self.rows) if row is None]
        lengths = [len(p) for p in prompts]
        # The longest prompt is the last one.
        self.cache.make_room(lengths[-1] + min(INITIAL_ROOM, self.settings.max_new_tokens))
        for group in partition(lengths, min(PREFILL_GROUPS, len(prompts))):
            places = [free[i] for i in group]
            width = lengths[group[-1]]
            pads = [width - lengths[i] for i in group]
            for i, place in zip(group, places, strict=True):
                self.rows[place] = rows[i]
                if self.draws_BT is not None:
                    self.draws_BT[place] = draws(rows[i].prompt)
            # Padded on the left, so that the last column holds every prompt's last token. Nothing attends to padding.
            ids_BT = torch.tensor([[0] * pad + list(prompts[i]) for pad, i in zip(pads, group, strict=True)])
            shift_B1 = torch.tensor(pads)[:, None]
            position_BT = (torch.arange(width) - shift_B1).clamp(min=0)
            mask_BT = (torch.arange(width) >= shift_B1).long() if any(pads) else None
            # transformers passes the cache only keys and values, so it learns here which rows they belong to.
            self.cache.begin_reading(places, [lengths[i] for i in group])
            logits_BV = self._logits(ids_BT, position_BT, mask_BT)
            self.cache.end_reading()
            self._pick(logits_BV, places)

    def step(self, *, shrink: bool) -> None:
        """Sample one more token in each row.

        Args:
            shrink: Drop free rows first.
        """
        if shrink and _round_up(self.n_live) < len(self.rows):
            self._compact(_round_up(self.n_live))
        position_B1 = self.cache.begin_step()
        # Rows are of different lengths: each attends to its own columns up to its new one.
        upto = self.cache.longest + 1
        behind_BT = torch.arange(upto) > position_B1
        # An additive mask with the least finite value: -inf would make a fully masked row NaN.
        bias_BT = torch.zeros(behind_BT.shape, dtype=self.dtype).masked_fill_(behind_BT, torch.finfo(self.dtype).min)
        logits_BV = self._logits(self.token_B[:, None], position_B1, bias_BT[:, None, None])
        self.cache.end_step()
        self._pick(logits_BV, range(len(self.rows)))

    def _logits(self, ids_BT: Tensor, position_BT: Tensor, mask: Tensor | None) -> Tensor:
        out = self.network(
            input_ids=ids_BT,
            attention_mask=mask,
            position_ids=position_BT,
            past_key_values=self.cache,
            **self.options,
        )
        return out.logits[:, -1]

    def _pick(self, logits_BV: Tensor, places: Sequence[int]) -> None:
        """Sample a token in each of these rows, and free the rows that end."""
        rows = [self.rows[place] for place in places]
        draws_B = None
        if self.draws_BT is not None:
            # Each row uses its own draws in order, so a response does not depend on the other rows.
            turn_B = torch.tensor([0 if row is None else len(row.tokens) for row in rows])
            draws_B = self.draws_BT[torch.tensor(places), turn_B]
        token_B, log_p_B = pick_scored(logits_BV, draws_B, self.settings.sampling)
        self.token_B[places] = token_B
        for place, row, token, log_p in zip(places, rows, token_B.tolist(), log_p_B.tolist(), strict=True):
            if row is not None:
                row.tokens.append(token)
                row.log_ps.append(log_p)
                if token in self.end_tokens or len(row.tokens) == row.limit:
                    self.ended.append(row)
                    self.rows[place] = None
                    self.cache.free(place)

    def _compact(self, n: int) -> None:
        """Keep only n rows, after moving live rows from beyond them into free ones."""
        # Only as many rows move as lie beyond the new end.
        source = [place for place in range(n, len(self.rows)) if self.rows[place] is not None]
        target = [place for place in range(n) if self.rows[place] is None][: len(source)]
        for a, b in zip(source, target, strict=True):
            self.rows[b] = self.rows[a]
        del self.rows[n:]
        self.cache.move(source, target, n)
        self.token_B[target] = self.token_B[source]
        self.token_B = self.token_B[:n]
        if self.draws_BT is not None:
            self.draws_BT[target] = self.draws_BT[source]
            self.draws_BT = self.draws_BT[:n]


def _round_up(n: int) -> int:
    """The number of rows, rounded up by at most a quarter: oneDNN compiles a kernel for each shape it meets."""
    step = 1 << max(0, n.bit_length() - 3)
    return -(-n // step) * step


class _Cache(Cache):
    """Keys and values of all layers, written in place. Each row fills its own columns, from 0 on.

    Attributes:
        n_rows: Rows in use.
        capacity: Columns allocated.
        lengths: Columns that each row has filled. A free row has 0; it keeps decoding at column 0, and nobody reads it.
        longest: The largest length, during a step.
    """

    def __init__(self, n_rows: int) -> None:
        super().__init__(layer_class_to_replicate=lambda: _Layer(self))  # pyright: ignore[reportArgumentType]
        self.n_rows, self.capacity, self.longest = n_rows, 0, 0
        self.lengths = [0] * n_rows
        self.place_B, self.column_B = torch.arange(n_rows), torch.zeros(n_rows, dtype=torch.long)
        self.reading: _Reading | None = None

    def all_layers(self) -> list[_Layer]:
        return self.layers  # pyright: ignore[reportReturnType]

    def make_room(self, columns: int) -> None:
        """Make sure that there are this many columns, growing by at least half so that copies stay rare."""
        # Geometric growth keeps the total cost of copies linear.
        if columns > self.capacity:
            self.capacity = max(columns, self.capacity * 3 // 2)
            for layer in self.all_layers():
                layer.grow()

    def begin_reading(self, places: list[int], lengths: list[int]) -> None:
        """Make the next forward pass write prompts of these lengths, padded on the left, to these rows."""
        self.reading = _Reading(places, lengths)

    def end_reading(self) -> None:
        assert self.reading is not None
        for place, length in zip(self.reading.places, self.reading.lengths, strict=True):
            self.lengths[place] = length
        self.reading = None

    def begin_step(self) -> Tensor:
        """(B, 1): the column of each row's next token."""
        self.longest = max(self.lengths)
        self.make_room(self.longest + 1)
        self.column_B = torch.tensor(self.lengths)
        return self.column_B[:, None]

    def end_step(self) -> None:
        self.lengths = [n + 1 if n else 0 for n in self.lengths]

    def free(self, place: int) -> None:
        self.lengths[place] = 0

    def move(self, source: list[int], target: list[int], n_rows: int) -> None:
        """Copy rows onto others, and keep only the first `n_rows`."""
        if source:
            # Columns beyond the longest of the moved rows are empty.
            upto = max(self.lengths[place] for place in source)
            for layer in self.all_layers():
                for states in (layer.keys, layer.values):
                    if states is not None:
                        states[target, :, :upto] = states[source, :, :upto]
            for a, b in zip(source, target, strict=True):
                self.lengths[b] = self.lengths[a]
        self.n_rows, self.place_B = n_rows, self.place_B[:n_rows]
        del self.lengths[n_rows:]


class _Reading:
    """The rows that a prefill writes to, and the shift that moves each prompt from the right to column 0."""

    def __init__(self, places: list[int], lengths: list[int]) -> None:
        self.places, self.lengths = places, lengths
        self.place_B, self.width = torch.tensor(places), max(lengths)
        self.is_padded = min(lengths) < self.width
        pad_B1 = self.width - torch.tensor(lengths)[:, None]
        self.column_BT = (torch.arange(self.width) + pad_B1) % self.width


class _Layer(DynamicLayer):
    """One layer's keys and values: (rows, heads, columns, head width)."""

    def __init__(self, cache: _Cache) -> None:
        super().__init__()
        self.cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.keys, self.values = self._room_for(key_states), self._room_for(value_states)
            self.is_initialized = True
        return self._put(self.keys, key_states), self._put(self.values, value_states)

    def _room_for(self, states: Tensor) -> Tensor:
        # Zeros, since columns that are masked have no weight but must not be NaN.
        return states.new_zeros(self.cache.n_rows, states.size(1), self.cache.capacity, states.size(3))

    def _put(self, room: Tensor, states: Tensor) -> Tensor:
        cache, reading = self.cache, self.cache.reading
        if reading is None:
            # A decoding step writes one column per row, each at its own position.
            room[cache.place_B, :, cache.column_B] = states[:, :, 0]
            return room[: cache.n_rows, :, : cache.longest + 1]
        aligned = states
        if reading.is_padded:
            # Shift each prompt from the right edge to column 0, where its row starts.
            aligned = states.gather(2, reading.column_BT[:, None, :, None].expand_as(states))
        room[reading.place_B, :, : reading.width] = aligned
        return states  # a prefill attends to its own tokens only, padding included in their order

    def grow(self) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self._grown(self.keys), self._grown(self.values)

    def _grown(self, room: Tensor) -> Tensor:
        larger = self._room_for(room)
        larger[:, :, : room.size(2)] = room[: self.cache.n_rows]
        return larger

    def get_seq_length(self) -> int:
        return 0 if self.cache.reading is not None else self.cache.longest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0
