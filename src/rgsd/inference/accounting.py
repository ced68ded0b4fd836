"""What requests cost: usage, prices, a budget that is never overspent, and a ledger of every request sent."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rgsd.errors import BudgetExhausted
from rgsd.progress import say


@dataclass(frozen=True, slots=True)
class Usage:
    """What requests cost.

    Args:
        calls: Requests sent, including failed ones.
        cached: Replies taken from the cache, at no cost.
        prompt_tokens, completion_tokens: As counted by the provider.
        price: In US dollars. None if the price of any reply is unknown.
        seconds: Time spent waiting for replies, summed over requests.
    """

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    price: float | None = 0.0
    seconds: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        price = None if self.price is None or other.price is None else self.price + other.price
        return Usage(
            self.calls + other.calls,
            self.cached + other.cached,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            price,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True, slots=True)
class Prices:
    """US dollars per million tokens."""

    input: float
    output: float

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of one request, in US dollars."""
        return (prompt_tokens * self.input + completion_tokens * self.output) / 1e6


@dataclass(frozen=True, slots=True)
class ListedModel:
    """A model's entry in the price table.

    Args:
        prices: For an ordinary request.
        highest: The most that any of its tokens can cost: long prompts and cache writes have their own prices.
        max_output_tokens: The longest reply, in tokens. None if it is not listed.
    """

    prices: Prices
    highest: Prices
    max_output_tokens: int | None


def listed_model(name: str) -> ListedModel | None:
    """Look up a model in LiteLLM's price table, or return None if it has no price there.

    This reads the table's file, because importing LiteLLM takes seconds.
    """
    # LiteLLM lists some models with their provider and some without.
    table = _price_table()
    entry = table.get(name) or table.get(name.partition("/")[2]) or {}
    if not entry.get("input_cost_per_token") and not entry.get("output_cost_per_token"):
        return None
    highest = Prices(
        1e6 * _highest(entry, "input_cost_per_token", "cache_creation_input_token_cost"),
        1e6 * _highest(entry, "output_cost_per_token", "output_cost_per_reasoning_token"),
    )
    prices = Prices(1e6 * (entry.get("input_cost_per_token") or 0), 1e6 * (entry.get("output_cost_per_token") or 0))
    limit = entry.get("max_output_tokens")
    return ListedModel(prices, highest, limit if isinstance(limit, int) else None)


def _highest(entry: Mapping[str, Any], *prefixes: str) -> float:
    # Batch, flex and priority prices apply only to requests that ask for them.
    other_tiers = ("_batches", "_flex", "_priority")
    costs = [v for k, v in entry.items() if k.startswith(prefixes) and not k.endswith(other_tiers)]
    return max((float(c) for c in costs if isinstance(c, int | float)), default=0.0)


@cache
def _price_table() -> Mapping[str, Any]:
    spec = importlib.util.find_spec("litellm")
    if spec is None or spec.origin is None:
        return {}
    try:
        table = json.loads((Path(spec.origin).parent / "model_prices_and_context_window_backup.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


class Budget:
    """Limits requests and dollars. Used on one event loop.

    Each request reserves the most it can cost before it is sent, so the budget is never overspent. A request that does
    not fit waits while others are in flight: they usually cost less than they reserved.

    Args:
        max_calls: Requests that may be sent. None: no limit.
        dollars: US dollars that may be spent. None: no limit.
    """

    def __init__(self, max_calls: int | None = None, dollars: float | None = None) -> None:
        self.max_calls, self.dollars = max_calls, dollars
        self.calls, self.spent, self.reserved = 0, 0.0, 0.0
        self._n_reserved = 0
        self._changed = asyncio.Event()

    async def reserve(self, most: float) -> None:
        """Admit a request that costs at most `most` dollars.

        Raises:
            BudgetExhausted: If the request does not fit and nothing in flight can free enough.
        """
        while True:
            if self.max_calls is not None and self.calls >= self.max_calls:
                raise BudgetExhausted(
                    f"judge_max_calls is {self.max_calls}, and all were sent. Judgements so far are kept: raise it "
                    "and run again"
                )
            if self.dollars is None or self.spent + self.reserved + most <= self.dollars:
                break
            # Nothing in flight can return money any more.
            if self._n_reserved == 0:
                raise BudgetExhausted(
                    f"judge_budget is {self.dollars:g} dollars, {self.spent:.4f} are spent, and the next request may "
                    f"cost up to {most:.4f}. Judgements so far are kept: raise judge_budget, or lower "
                    "judge_max_tokens, and run again"
                )
            self._changed.clear()
            await self._changed.wait()
        self.calls += 1
        self._n_reserved += 1
        self.reserved += most

    def settle(self, reserved: float, spent: float) -> None:
        """Replace a request's reservation by its cost."""
        self._n_reserved -= 1
        # With nothing reserved the sum is exactly zero. Subtraction would leave rounding errors.
        self.reserved = self.reserved - reserved if self._n_reserved else 0.0
        self.spent += spent
        self._changed.set()

    def cancel(self, reserved: float) -> None:
        """Take back the reservation of a request that is not sent."""
        self.settle(reserved, 0.0)
        self.calls -= 1


class RequestLedger:
    """A file with one line for every request sent and one for its outcome.

    Rows of a run are written only when a response is judged. The requests of a killed process are recorded here alone.

    Args:
        path: Appended to. Several processes may share it.
        label: What the requests are for, e.g. an arm.
    """

    def __init__(self, path: Path, label: str = "") -> None:
        self.path, self.label = path, label
        self._is_faulty = False

    def sent(self) -> str:
        """Record a request before it is sent; returns its id."""
        request_id = uuid.uuid4().hex[:16]
        self._append({"id": request_id, "label": self.label, "at": round(time.time(), 3)})
        return request_id

    def finished(self, request_id: str, usage: Usage) -> None:
        """Record what a request cost."""
        self._append({"id": request_id, "usage": asdict(usage)})

    def _append(self, line: Mapping[str, Any]) -> None:
        data = (json.dumps(line) + "\n").encode()
        try:
            # One write with O_APPEND: lines of several processes do not mix, and a kill leaves at most half a line.
            fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(fd, data)
            finally:
                os.close(fd)
        except OSError as error:  # a paid reply matters more than its record
            if not self._is_faulty:
                say(f"  {self.path.name} cannot be written ({error}): requests are no longer recorded there")
            self._is_faulty = True


def ledger_totals(path: Path) -> dict[str, Usage]:
    """The usage of all requests in a ledger, by label. A request without an outcome counts as a call that cost nothing.

    Damaged lines, such as the last one after a kill, are skipped.
    """
    sent: dict[str, str] = {}
    totals: dict[str, Usage] = {}
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        try:
            entry = json.loads(line)
            if "label" in entry:
                label = sent[entry["id"]] = str(entry["label"])
                totals[label] = totals.get(label, Usage()) + Usage(calls=1)
            else:
                # The call was counted when it was sent.
                usage = Usage(**{**entry["usage"], "calls": 0})
                totals[sent[entry["id"]]] += usage
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return totals
