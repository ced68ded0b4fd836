"""Batched decoding on a CPU: the model's own forward, with the loop, the cache and the linear layers made for it.

Against transformers' `generate`: keys and values are written in place and never copied to grow by one token; a sequence
that has ended leaves the batch, and a prompt that waits takes its place; sampling is `sampling.pick`; linear layers are
`linears.packed`, LoRA added in; prompts are read in groups of about one length. Greedy tokens are those of `generate`,
and sampled ones have its distribution.

`generate` takes what it knows to be right, and returns None for the rest: then transformers' own is to be asked.

Letters in names: B rows, L layers, T tokens, V words.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Cache, DynamicLayer, GenerationConfig, GenerationMixin

from rgsd.models.batching import partition
from rgsd.models.kernels import is_on
from rgsd.models.kernels.linears import can_merge, packed
from rgsd.models.kernels.sampling import Sampling, pick_scored

ROOM = 128
"""Tokens of a response that the cache has room for at first."""
READ_GROUPS = 4
"""Into so many groups, by length, the prompts are cut to be read."""
REFILL = 8
"""Prompts that wait are read when this part of the places is free: a pass over a few tokens reads all weights too."""

_READ = frozenset({"max_new_tokens", "max_length", "do_sample", "temperature", "top_k", "top_p", "min_p"})
"""What of a generation config `plan` reads itself."""
_IDLE = frozenset(
    {"eos_token_id", "pad_token_id", "bos_token_id", "transformers_version", "disable_compile", "compile_config"}
)
"""What may stand in one: the first is read, the others change nothing here."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What `decode` is to do: how words are picked, which tokens end a response, how long one may be."""

    sampling: Sampling
    ends: tuple[int, ...]
    max_new_tokens: int


def plan(model: Any, config: GenerationConfig) -> Plan | None:
    """What `model.generate(generation_config=config)` would do, or None where that is more than `decode` can.

    The checkpoint's own settings fill the gaps of `config`, as there.
    """
    network = _network(model)
    whole = network._prepare_generation_config(config)[0]
    neutral = {**GenerationConfig().to_dict(), **GenerationConfig._get_default_generation_params()}
    for name, value in whole.to_dict().items():
        known = name in _READ or name in _IDLE or name.startswith("_")
        unset = value is None or value == neutral.get(name) or (value is False and not neutral.get(name))
        if not (known or unset):
            return None
    if not whole.max_new_tokens:
        return None
    ends = whole.eos_token_id if isinstance(whole.eos_token_id, list) else [whole.eos_token_id]
    if whole.do_sample:
        if not whole.temperature:
            return None
        how = Sampling(whole.temperature, whole.top_p or 1.0, whole.top_k or 0, whole.min_p or 0.0)
    else:
        how = Sampling(0.0)
    return Plan(how, tuple(e for e in ends if e is not None), whole.max_new_tokens)


def covers(model: nn.Module) -> bool:
    """Whether `decode` knows the model: on a CPU, a causal transformer of plain attention over its whole past, which
    leaves `generate` as transformers wrote it, with no adapter but plain LoRA."""
    network: Any = _network(model)
    if not (is_on() and issubclass(type(network), GenerationMixin)):
        return False
    if any(p.device.type != "cpu" for p in network.parameters()):
        return False
    config = network.config.get_text_config()
    kinds = getattr(config, "layer_types", None) or []
    owned = ("generate", "prepare_inputs_for_generation", "_prepare_cache_for_generation", "_sample")
    return (
        all(getattr(type(network), n) is getattr(GenerationMixin, n) and n not in vars(network) for n in owned)
        and bool(getattr(network, "_supports_attention_backend", False))
        and config._attn_implementation in ("sdpa", "eager")
        and not (config.is_encoder_decoder or getattr(network, "_is_stateful", False))
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
    """A response to each prompt as `model.generate` would give it, ended by its end token if it came to one; or None
    where that is not known to be so. Draws from torch's global generator."""
    what = plan(model, config) if prompts and covers(model) else None
    if what is None:
        return None
    draws_BT = torch.empty(0)
    if not what.sampling.is_greedy:
        draws_BT = torch.rand(len(prompts), what.max_new_tokens, dtype=torch.float64)
    with ready(model, len(prompts)):
        return decode(model, prompts, what, rows=len(prompts), draws=lambda i: draws_BT[i], scored=scored)


@contextmanager
def ready(model: nn.Module, rows: int) -> Iterator[None]:
    """Within it, `decode` finds the model in eval mode and its linear layers packed for so many rows.

    Under autocast these multiply in its precision."""
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
    what: Plan,
    *,
    rows: int,
    draws: Callable[[int], Tensor],
    done: Callable[[int, list[int]], None] | None = None,
    limits: Sequence[int] | None = None,
    scored: Callable[[int, list[float]], None] | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, in the prompts' order, up to and with an end token.

    Args:
        model: one that `covers` holds for, within `ready`.
        prompts: token ids, at least one each.
        what: the settings.
        rows: sequences at once. When some have ended, the next prompts take their places, shortest first.
        draws: a prompt's draws, from 0 to 1 in float64, one a token. Not asked for when greedy.
        done: called with a prompt and its new tokens as soon as these are there.
        scored: called with a prompt and the log-probability, in nats, with which each of its tokens was picked.
        limits: each prompt's own longest response in tokens; None: `what.max_new_tokens` for all.
    """
    rows = min(rows, len(prompts))
    batch = _Batch(_network(model), what, rows)
    waiting = deque(sorted(range(len(prompts)), key=lambda i: len(prompts[i])))
    found: list[list[int]] = [[] for _ in prompts]
    while waiting or batch.n_live:
        if waiting and rows - batch.n_live >= min(max(1, rows // REFILL), len(waiting)):
            next_ones = [waiting.popleft() for _ in range(min(rows - batch.n_live, len(waiting)))]
            new = [_Row(i, what.max_new_tokens if limits is None else limits[i]) for i in next_ones]
            batch.read(new, [prompts[i] for i in next_ones], draws)
        else:
            batch.step(shrink=not waiting)
        for row in batch.take_ended():
            found[row.prompt] = row.tokens
            if scored is not None:
                scored(row.prompt, row.log_ps)
            if done is not None:
                done(row.prompt, row.tokens)
    return found


def _network(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


@dataclass(slots=True)
class _Row:
    """A sequence in the making: which prompt, how many new tokens at most, and these."""

    prompt: int
    limit: int
    tokens: list[int] = field(default_factory=list)
    log_ps: list[float] = field(default_factory=list)


class _Batch:
    """Sequences that are decoded together, each in a row of its own and at a place of its own."""

    def __init__(self, network: Any, what: Plan, rows: int) -> None:
        self.network, self.what = network, what
        self.ends = frozenset(what.ends)
        self.rows: list[_Row | None] = [None] * rows
        self.is_done: list[_Row] = []
        self.cache = _Cache(rows)
        self.token_B = torch.zeros(rows, dtype=torch.long)
        self.draws_BT = None if what.sampling.is_greedy else torch.zeros(rows, what.max_new_tokens, dtype=torch.float64)
        self.dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else network.dtype
        self.options: dict[str, Any] = {"use_cache": True}
        if "logits_to_keep" in inspect.signature(network.forward).parameters:
            self.options["logits_to_keep"] = 1

    @property
    def n_live(self) -> int:
        return sum(row is not None for row in self.rows)

    def take_ended(self) -> list[_Row]:
        ended, self.is_done = self.is_done, []
        return ended

    def read(self, rows: list[_Row], prompts: list[Sequence[int]], draws: Callable[[int], Tensor]) -> None:
        """Put prompts, shortest first, into free rows, and pick the first token of each."""
        free = [place for place, row in enumerate(self.rows) if row is None]
        lengths = [len(p) for p in prompts]
        self.cache.make_room(lengths[-1] + min(ROOM, self.what.max_new_tokens))
        for group in partition(lengths, min(READ_GROUPS, len(prompts))):
            places = [free[i] for i in group]
            wide = lengths[group[-1]]
            pads = [wide - lengths[i] for i in group]
            for i, place in zip(group, places, strict=True):
                self.rows[place] = rows[i]
                if self.draws_BT is not None:
                    self.draws_BT[place] = draws(rows[i].prompt)
            # Padded on the left with token 0, which nothing attends to, so that the last logits are those wanted.
            ids_BT = torch.tensor([[0] * pad + list(prompts[i]) for pad, i in zip(pads, group, strict=True)])
            shift_B1 = torch.tensor(pads)[:, None]
            position_BT = (torch.arange(wide) - shift_B1).clamp(min=0)
            mask_BT = (torch.arange(wide) >= shift_B1).long() if any(pads) else None
            self.cache.begin_reading(places, [lengths[i] for i in group])
            logits_BV = self._logits(ids_BT, position_BT, mask_BT)
            self.cache.end_reading()
            self._pick(logits_BV, places)

    def step(self, *, shrink: bool) -> None:
        """One more token of each row. With `shrink`, places that are free go out of use first."""
        if shrink and _round_up(self.n_live) < len(self.rows):
            self._compact(_round_up(self.n_live))
        position_B1 = self.cache.begin_step()
        upto = self.cache.longest + 1
        behind_BT = torch.arange(upto) > position_B1
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
        """A token for each of these rows; those that end by it free their places."""
        rows = [self.rows[place] for place in places]
        draws_B = None
        if self.draws_BT is not None:
            turn_B = torch.tensor([0 if row is None else len(row.tokens) for row in rows])
            draws_B = self.draws_BT[torch.tensor(places), turn_B]
        token_B, log_p_B = pick_scored(logits_BV, draws_B, self.what.sampling)
        self.token_B[places] = token_B
        for place, row, token, log_p in zip(places, rows, token_B.tolist(), log_p_B.tolist(), strict=True):
            if row is not None:
                row.tokens.append(token)
                row.log_ps.append(log_p)
                if token in self.ends or len(row.tokens) == row.limit:
                    self.is_done.append(row)
                    self.rows[place] = None
                    self.cache.free(place)

    def _compact(self, n: int) -> None:
        """Move live rows from behind the first n into free places among these."""
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
    """Up to a quarter more rows, so that products come in few shapes: oneDNN makes a kernel for each."""
    step = 1 << max(0, n.bit_length() - 3)
    return -(-n // step) * step


class _Cache(Cache):
    """Keys and values of all layers, written in place: each row's from column 0 on, as far as it has come.

    Attributes:
        n_rows: rows in use.
        capacity: columns that there are.
        lengths: columns that each row has filled; 0 for a free one, which decodes on at column 0, unheard.
        longest: the greatest of them, for the step under way.
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
        """See that there are so many columns; when more are wanted, by half as many again."""
        if columns > self.capacity:
            self.capacity = max(columns, self.capacity * 3 // 2)
            for layer in self.all_layers():
                layer.grow()

    def begin_reading(self, places: list[int], lengths: list[int]) -> None:
        """The next forward pass reads prompts of these lengths, padded on the left, into these rows."""
        self.reading = _Reading(places, lengths)

    def end_reading(self) -> None:
        assert self.reading is not None
        for place, length in zip(self.reading.places, self.reading.lengths, strict=True):
            self.lengths[place] = length
        self.reading = None

    def begin_step(self) -> Tensor:
        """(B, 1): the column that each row's next token is to have."""
        self.longest = max(self.lengths)
        self.make_room(self.longest + 1)
        self.column_B = torch.tensor(self.lengths)
        return self.column_B[:, None]

    def end_step(self) -> None:
        self.lengths = [n + 1 if n else 0 for n in self.lengths]

    def free(self, place: int) -> None:
        self.lengths[place] = 0

    def move(self, source: list[int], target: list[int], n_rows: int) -> None:
        """Copy rows onto others, and use the first `n_rows` alone."""
        if source:
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
    """Which rows read prompts, and from which column of the padded ones each row's columns come."""

    def __init__(self, places: list[int], lengths: list[int]) -> None:
        self.places, self.lengths = places, lengths
        self.place_B, self.wide = torch.tensor(places), max(lengths)
        self.is_padded = min(lengths) < self.wide
        pad_B1 = self.wide - torch.tensor(lengths)[:, None]
        self.column_BT = (torch.arange(self.wide) + pad_B1) % self.wide


class _Layer(DynamicLayer):
    """One layer's keys and values: rows x heads x columns x width of a head."""

    def __init__(self, cache: _Cache) -> None:
        super().__init__()
        self.cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.keys, self.values = self._room_for(key_states), self._room_for(value_states)
            self.is_initialized = True
        return self._put(self.keys, key_states), self._put(self.values, value_states)

    def _room_for(self, states: Tensor) -> Tensor:
        # Zeros: what a row has not filled has no weight, but must be numbers.
        return states.new_zeros(self.cache.n_rows, states.size(1), self.cache.capacity, states.size(3))

    def _put(self, room: Tensor, states: Tensor) -> Tensor:
        cache, reading = self.cache, self.cache.reading
        if reading is None:
            room[cache.place_B, :, cache.column_B] = states[:, :, 0]
            return room[: cache.n_rows, :, : cache.longest + 1]
        whole = states
        if reading.is_padded:
            whole = states.gather(2, reading.column_BT[:, None, :, None].expand_as(states))
        room[reading.place_B, :, : reading.wide] = whole
        return states

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
