"""`ChatClient`: the client for chat completions behind both the server generator and the LLM judge.

It runs one event loop in its own thread, keeps at most `concurrency` requests in flight, retries by one policy, and
accounts for every request and its cost.
"""

from __future__ import annotations

import asyncio
import json
import queue
import random
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from rgsd.errors import ConfigError, Interrupted, RGSDError
from rgsd.inference.accounting import Budget, Prices, RequestLedger, Usage
from rgsd.inference.replies import ChatFault, ChatReply, Problem
from rgsd.inference.transports import Transport
from rgsd.progress import say

MAX_RETRY_AFTER = 600.0
"""The longest `Retry-After` that is honored, in seconds."""

Item = TypeVar("Item")
Result = TypeVar("Result")
Work = Callable[[Item], Coroutine[Any, Any, Result]]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to send a request again.

    Args:
        retries: The number of retries after the first try.
        first_wait, max_wait: The pause before the first retry and the longest pause, in seconds. Each pause is twice
            the last, minus up to half at random. A `Retry-After` of the server takes its place, for all requests.
        give_up_after: After this many requests in a row that failed in all their tries, the server counts as down.

    Raises:
        ConfigError: If a value is out of range.
    """

    retries: int = 6
    first_wait: float = 1.0
    max_wait: float = 60.0
    give_up_after: int = 20

    def __post_init__(self) -> None:
        for name, least in (("retries", 0), ("first_wait", 0.0), ("max_wait", 0.0), ("give_up_after", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class Bound:
    """An upper bound of a request's cost: a byte of it is at most one token, and the reply is limited.

    Args:
        prices: The highest prices of the model.
        max_tokens: The longest reply, in tokens.
    """

    prices: Prices
    max_tokens: int

    def of(self, body: Mapping[str, Any]) -> float:
        """The most that a request can cost, in US dollars."""
        return self.prices.cost(len(json.dumps(body)), self.max_tokens)


@dataclass
class Account:
    """What a client may spend, and where it records its requests.

    Args:
        prices: The prices of tokens. None uses the price that the transport reports.
        budget: Limits on requests and dollars.
        bound: The most a request can cost. Required if the budget limits dollars.
        ledger: Records every request.
    """

    prices: Prices | None = None
    budget: Budget = field(default_factory=Budget)
    bound: Bound | None = None
    ledger: RequestLedger | None = None


class ChatClient:
    """Sends chat requests and returns their replies. A context manager; `close` ends its thread.

    Args:
        transport: Sends one request.
        concurrency: Requests in flight at once.
        timeout: Seconds for one request, to the last byte of its reply.
        retry: When to send a request again.
        account: Prices, limits and records.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        concurrency: int = 16,
        timeout: float = 600.0,
        retry: RetryPolicy | None = None,
        account: Account | None = None,
    ) -> None:
        self.transport, self.concurrency, self.timeout = transport, concurrency, timeout
        self.retry, self.account = retry or RetryPolicy(), account or Account()
        self.usage = Usage()
        self.in_flight = 0
        self.failures_in_a_row = 0
        self.stopped_by: RGSDError | None = None
        """The error that ended the current batch. No further request is sent."""
        self._limit_field = "max_tokens"
        self._not_before = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        # Bound to the loop on first use, so they can be made in the caller's thread.
        self._slots = asyncio.Semaphore(concurrency)
        self._stopping = asyncio.Event()

    def __enter__(self) -> ChatClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # In the caller's thread.

    def start(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Start a coroutine on the client's loop."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            # In a separate thread, since the caller may have a running loop (a notebook), and may block in `done`.
            self._thread = threading.Thread(target=self._loop.run_forever, name="rgsd-chat", daemon=True)
            self._thread.start()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(
        self,
        work: Work[Item, Result],
        items: Sequence[Item],
        done: Callable[[int, Result], None],
        *,
        drain: bool,
    ) -> None:
        """Do the work for every item, and pass each position and result to `done` in this thread as it completes.

        If the work raises an `RGSDError`, the batch ends: no further request is sent, those in flight are awaited, and
        then the error is raised.

        Args:
            work: Called on the client's loop.
            items: Its arguments.
            done: Receives each position and result.
            drain: Whether an interruption (Ctrl-C, SIGTERM, an error in `done`) awaits requests in flight, because they
                are paid for, or drops them.
        """
        RequestBatch(self, work, items, done).run(drain=drain)

    def reset(self) -> None:
        """Allow requests again after a batch has ended early."""
        self.stopped_by = None
        self._stopping.clear()

    def close(self) -> None:
        """Drop requests in flight, close connections and end the thread."""
        if self._loop is None or self._thread is None:
            return
        loop, self._loop = self._loop, None
        # Close connections on the loop that opened them.
        asyncio.run_coroutine_threadsafe(self._shut_down(), loop).result(timeout=10)
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    # On the client's loop.

    def stop(self, error: RGSDError) -> None:
        """Stop sending requests. Only the first error is kept."""
        self.stopped_by = self.stopped_by or error
        self._stopping.set()

    async def ask(
        self,
        body: Mapping[str, Any],
        *,
        check: Callable[[ChatReply], None] | None = None,
        retries: int | None = None,
    ) -> ChatReply:
        """Send a request, with as many retries as the policy allows.

        Args:
            body: Fields of OpenAI's chat completions.
            check: Raises a transient `ChatFault` for a reply that must be requested again.
            retries: Overrides the number of retries in the policy.

        Returns:
            The reply, with the usage of all tries.

        Raises:
            ChatFault: If there is no reply, with the usage of all tries.
            RGSDError: If the batch has been stopped, or the budget is exhausted.
        """
        retries = self.retry.retries if retries is None else retries
        usage, tries = Usage(), 0
        while True:
            named = self._with_limit_field(body)
            try:
                reply = await self._send(named, check)
            except ChatFault as error:
                fault = error
            else:
                self.failures_in_a_row = 0
                return replace(reply, usage=usage + reply.usage)
            usage += fault.usage
            fault.usage = usage
            if "max_tokens" in named and "max_completion_tokens" in str(fault):
                # OpenAI's newer models renamed the field. This costs no retry, and later requests use the new name.
                self._limit_field = "max_completion_tokens"
                continue
            if not fault.is_transient:
                raise fault
            if tries == retries:
                # A success resets the count, so it reaches the limit only if the server is down for everybody.
                self.failures_in_a_row += 1
                raise fault
            await self._pause(fault, tries)
            tries += 1

    @property
    def has_given_up(self) -> bool:
        """Whether too many requests in a row failed in all their tries."""
        return self.failures_in_a_row >= self.retry.give_up_after

    def _with_limit_field(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        return {self._limit_field if k == "max_tokens" else k: v for k, v in body.items()}

    async def _pause(self, fault: ChatFault, tries: int) -> None:
        if fault.retry_after is None:
            wait = min(self.retry.max_wait, self.retry.first_wait * 2**tries) * random.uniform(0.5, 1.0)
        elif fault.retry_after > MAX_RETRY_AFTER:
            late = ChatFault(
                Problem.WAIT_TOO_LONG,
                f"the server asks to wait {fault.retry_after:,.0f} s, more than the limit of {MAX_RETRY_AFTER:,.0f} s: "
                f"{fault}",
                status=fault.status,
            )
            late.usage = fault.usage
            raise late
        else:
            # Rate limits apply to the account, so all requests wait. The jitter keeps them from returning at once.
            self._not_before = max(self._not_before, time.monotonic() + fault.retry_after)
            wait = fault.retry_after * random.uniform(1.0, 1.1)
        await self._sleep(wait)

    async def _sleep(self, seconds: float) -> None:
        """Wait, but return at once when the batch is stopped."""
        try:
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        except TimeoutError:
            pass

    async def _send(self, body: Mapping[str, Any], check: Callable[[ChatReply], None] | None) -> ChatReply:
        """Send a request once, within the limits, and account for it.

        Raises:
            ChatFault: With the usage of this try.
        """
        account = self.account
        async with self._slots:
            # Another request may have been told to wait meanwhile, so check again after each sleep.
            while (wait := self._not_before - time.monotonic()) > 0 and self.stopped_by is None:
                await self._sleep(wait)
            # Reserve the most that the request can cost, so that concurrent requests cannot overspend together.
            most = account.bound.of(body) if account.bound else 0.0
            await account.budget.reserve(most)
            if self.stopped_by is not None:  # the batch ended while this request waited
                account.budget.cancel(most)
                raise self.stopped_by
            request_id = account.ledger.sent() if account.ledger else ""
            start, usage, spent = time.monotonic(), Usage(calls=1), most
            self.in_flight += 1
            try:
                reply = await self._reply(body)
                usage += self._cost(reply)
                spent = most if usage.price is None else usage.price
                if check is not None:
                    check(reply)
            except ChatFault as fault:
                # A timeout may be billed, a refused connection or a rate limit is not.
                if not fault.may_be_billed:
                    spent = 0.0
                fault.usage = usage = usage + Usage(seconds=time.monotonic() - start)
                raise
            else:
                usage += Usage(seconds=time.monotonic() - start)
                return replace(reply, usage=usage)
            finally:
                # Also when the request is cancelled: it may be billed, so `spent` is the most that it can cost.
                self.in_flight -= 1
                self.usage += usage
                account.budget.settle(most, spent)
                if account.ledger:
                    account.ledger.finished(request_id, usage)

    async def _reply(self, body: Mapping[str, Any]) -> ChatReply:
        try:
            async with asyncio.timeout(self.timeout):
                return await self.transport.send(body)
        except TimeoutError as error:
            raise ChatFault(Problem.TIMEOUT, f"no complete reply within {self.timeout:g} s") from error

    def _cost(self, reply: ChatReply) -> Usage:
        read, written, price = reply.prompt_tokens, reply.completion_tokens, reply.price
        if self.account.prices is not None:
            price = None if read is None or written is None else self.account.prices.cost(read, written)
        return Usage(prompt_tokens=read or 0, completion_tokens=written or 0, price=price)

    async def _shut_down(self) -> None:
        """Cancel all tasks on the loop, including those that libraries started."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.transport.close()


class RequestBatch(Generic[Item, Result]):
    """One call of `ChatClient.run`: workers on the client's loop, results in the calling thread."""

    def __init__(
        self, client: ChatClient, work: Work[Item, Result], items: Sequence[Item], done: Callable[[int, Result], None]
    ) -> None:
        self._client, self._work, self._items, self._done = client, work, items, done
        self._positions = iter(range(len(items)))
        self._results: queue.SimpleQueue[tuple[int, Result] | None] = queue.SimpleQueue()

    def run(self, *, drain: bool) -> None:
        """See `ChatClient.run`."""
        client = self._client
        client.reset()
        future = client.start(self._all())
        with _sigterm_interrupts():
            try:
                while (result := self._results.get()) is not None:
                    self._done(*result)
                future.result()
            except BaseException as error:
                self._end(future, drain=drain)
                if isinstance(error, KeyboardInterrupt | Interrupted):
                    # The caller stores what `done` receives, so paid results survive the interruption.
                    self._hand_over_rest()
                raise
        if client.stopped_by is not None:
            raise client.stopped_by

    async def _all(self) -> None:
        # Workers share one iterator, so items start in order and no more than `concurrency` are in progress.
        n_workers = min(len(self._items), self._client.concurrency)
        workers = [asyncio.create_task(self._worker()) for _ in range(n_workers)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            # Tells the calling thread that no more results follow.
            self._results.put(None)

    async def _worker(self) -> None:
        for i in self._positions:
            if self._client.stopped_by is not None:
                return
            try:
                self._results.put((i, await self._work(self._items[i])))
            except RGSDError as error:
                self._client.stop(error)

    def _end(self, future: Future[None], *, drain: bool) -> None:
        """Stop sending requests. If draining, await those in flight, until the next Ctrl-C."""
        if future.done():
            return
        client = self._client
        try:
            if drain:
                client.start(self._stop()).result()
                if client.in_flight:
                    say(f"  waiting for {client.in_flight} replies in flight; press Ctrl-C to drop them")
                future.exception(timeout=client.timeout)
        except (TimeoutError, CancelledError):
            pass
        finally:
            future.cancel()
            with suppress(Exception, CancelledError):
                future.result(timeout=5)

    async def _stop(self) -> None:
        self._client.stop(Interrupted("interrupted. Results so far are kept: run the same command again"))

    def _hand_over_rest(self) -> None:
        """Pass on the results that arrived meanwhile, because they are paid for."""
        while not self._results.empty():
            result = self._results.get()
            if result is not None:
                self._done(*result)


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """Raise `Interrupted` on the first SIGTERM. Repeated ones are ignored while replies in flight are awaited.

    This replaces only the default handler. Training has its own.
    """
    is_default = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not is_default or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        # Launchers and schedulers often send the signal more than once.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Interrupted("stopped by SIGTERM. What was judged is kept: run the same command again to continue")

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
