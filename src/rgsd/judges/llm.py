"""The LLM judge: it sends requests through `ChatClient`, caches replies, and never guesses at an unclear reply."""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rgsd.errors import ConfigError, JudgeError, JudgeUnreachable
from rgsd.inference.accounting import Budget, Prices, RequestLedger, Usage, listed_model
from rgsd.inference.chat import Account, Bound, ChatClient, RetryPolicy
from rgsd.inference.replies import ChatFault, ChatReply, Problem
from rgsd.inference.transports import HTTPTransport, LiteLLMTransport, Transport, parse_api_base, read_key
from rgsd.judges.cache import LEASE, RENEW_EVERY, ReplyCache
from rgsd.judges.config import JudgeConfig
from rgsd.judges.judgement import Judgement, Task
from rgsd.judges.prompt import (
    MAX_REPLY_CHARS,
    PROMPT_VERSION,
    Request,
    UnusableReply,
    join,
    new_code,
    requests,
    unscored,
)
from rgsd.progress import say
from rgsd.redaction import remember, remember_settings, without_url_credentials
from rgsd.rubrics import Criterion, Example, Rubric

ANNOUNCE_AFTER = 5.0
"""Seconds of waiting for another process before the judge says so."""
POLL_EVERY = 0.05
"""Seconds between checks for a reply that another process has requested."""
TEST_SECONDS, TEST_TRIES = 15.0, 3
"""The time limit of the test call, and its maximum number of tries."""


@dataclass(frozen=True, slots=True)
class Question:
    """A free question to the judge, for audits.

    Args:
        texts: Takes the code of the request, and returns the system and user texts. The code is random, and markers and
            ids contain it, so no text that the judge reads can know them.
        schema: The JSON schema of the reply.
        read: Takes the reply and the code, and returns the reply's value. Raises `UnusableReply` if the judge must be
            asked again.
    """

    texts: Callable[[str], tuple[str, str]]
    schema: dict[str, Any]
    read: Callable[[str, str], Any]


@dataclass(frozen=True, slots=True)
class JudgeReply:
    """A reply in its stored form.

    Args:
        text: The full reply, or its start if it is too long to be read.
        code: The code of its request. A later run draws another code, so it is stored with the reply.
        finish_reason: Why the reply ended.
        is_refusal: Whether the judge declined.
    """

    text: str
    code: str
    finish_reason: str | None = "stop"
    is_refusal: bool = False

    @classmethod
    def of(cls, reply: ChatReply, code: str) -> JudgeReply:
        """Convert a reply to its stored form."""
        text = reply.text or reply.refusal
        if len(text) > MAX_REPLY_CHARS:
            text = text[:1000] + " [...]"
        is_refusal = bool(reply.refusal) or reply.finish_reason == "content_filter"
        return cls(text, code, reply.finish_reason, is_refusal)

    def value(self, asked: Request | Question) -> Any:
        """The value of the reply.

        Raises:
            UnusableReply: If the judge did not end the reply by itself, or it cannot be read. A truncated reply is
                never read: it may end inside a quotation of the response.
        """
        if self.is_refusal:
            raise UnusableReply("refusal", f"the judge declined: {self.text[:120]!r}")
        if self.finish_reason == "length":
            raise UnusableReply("cut", "the reply was truncated: raise judge_max_tokens")
        if self.finish_reason != "stop":
            raise UnusableReply("cut", f"the judge did not end the reply: finish_reason is {self.finish_reason!r}")
        return asked.read(self.text, self.code)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a question.

    Args:
        value: The value of the reply, or None if there is no usable reply.
        reply: The last raw reply.
        usage: The cost of all requests.
        problem, detail: Why there is no value.
    """

    value: Any = None
    reply: str = ""
    usage: Usage = field(default_factory=Usage)
    problem: str = ""
    detail: str = ""


class LLMJudge:
    """A language model as the judge.

    If a reply is unusable, refused or missing after all tries, its criteria are unscored, with the reason. Only a
    problem that would make every further request fail is an error.

    Raises:
        ConfigError: If the extra `judge` is missing, or judge_budget is set and nothing bounds the cost of a request.
        JudgeError: From `judge` and `judge_all`, if the key is refused, the model does not exist, or too many requests
            in a row failed, and `BudgetExhausted` if the budget is spent. All judgements so far have been passed to
            `done`, and their replies are in the cache.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        remember(os.environ.get(self._key_variable))
        remember_settings(config.judge_api_base)
        self.model = config.judge
        # The name under which LiteLLM's price table and cache keys know a model of an OpenAI-compatible server.
        if config.judge_api_base and not config.judge.startswith("openai/"):
            self.model = f"openai/{config.judge}"
        details = [config.judge_mode.replace("_", " ")]
        details += [config.judge_strictness] if config.judge_strictness != "plain" else []
        details += [f"sample {config.judge_sample}"] if config.judge_sample else []
        self.name = f"{config.judge} ({', '.join(details)})"
        account = _account(config, self.model)
        self._client = ChatClient(
            self._transport(),
            concurrency=config.judge_concurrency,
            timeout=config.judge_timeout,
            retry=RetryPolicy(
                config.judge_retries, max_wait=config.judge_retry_max_wait, give_up_after=config.judge_give_up_after
            ),
            account=account,
        )
        path = config.cache_path()
        self._cache = ReplyCache(path) if path else None
        self._wait_is_announced = False
        self._is_tested, self._test_lock = True, asyncio.Lock()
        self._unreachable: JudgeUnreachable | None = None
        # A command that fails must still write the replies that are in memory.
        atexit.register(self.close)

    @property
    def usage(self) -> Usage:
        """The cost of all requests so far."""
        return self._client.usage

    def judge(self, example: Example, response: str) -> Judgement:
        """Judge one response."""
        return self.judge_all([(example, response)])[0]

    def judge_all(self, tasks: Sequence[Task], done: Callable[[int, Judgement], None] | None = None) -> list[Judgement]:
        """Judge many responses, with at most `judge_concurrency` requests in flight. See `Judge.judge_all`."""
        return self._run(self._judge, tasks, done)

    def ask_all(self, questions: Sequence[Question], done: Callable[[int, Any], None] | None = None) -> list[Any]:
        """Ask free questions, for audits. Cache, retries, limits and accounting are those of `judge_all`.

        Returns:
            The value of each reply, or None where there is no usable reply.
        """
        return self._run(self._ask_freely, questions, done)

    def test_call(self, *, lazily: bool = False) -> None:
        """Send one small request, so that a wrong key, model or address ends a command before it has done any work.

        Args:
            lazily: Send it only before the first request that the cache cannot answer. For commands that only judge.

        Raises:
            JudgeError: If there is no answer within `TEST_SECONDS`, with the server's reason.
        """
        if not self.config.judge_test_call:
            return
        self._is_tested, self._unreachable = False, None
        if not lazily:
            self._client.run(lambda _: self._test(), [None], lambda *_: None, drain=False)

    def assume_unreachable(self, error: JudgeUnreachable) -> None:
        """Answer from the cache alone: another judge on this server got no answer. Any other request raises `error`."""
        self._is_tested, self._unreachable = False, error

    def record_requests(self, path: Path, label: str = "") -> None:
        """Record all further requests in a ledger.

        Args:
            path: The ledger's file; see `RequestLedger`.
            label: What the requests are for, e.g. an arm.
        """
        ledger = self._client.account.ledger
        if ledger is not None and ledger.path == path:
            ledger.label = label
        else:
            self._client.account.ledger = RequestLedger(path, label)

    def close(self) -> None:
        """Close the cache and end the client's thread."""
        self._client.close()
        if self._cache is not None:
            self._cache.close()
        atexit.unregister(self.close)

    def _run(
        self, work: Callable[[Any], Any], items: Sequence[Any], done: Callable[[int, Any], None] | None
    ) -> list[Any]:
        results: list[Any] = [None] * len(items)

        def finish(i: int, result: Any) -> None:
            results[i] = result
            if done is not None:
                done(i, result)

        # Claims expire unless renewed, and a slow judge takes longer than a lease.
        renewing = self._client.start(self._renew_claims())
        try:
            self._client.run(work, items, finish, drain=True)
        finally:
            renewing.cancel()
        return results

    # On the client's loop.

    async def _renew_claims(self) -> None:
        while self._cache is not None:
            await asyncio.sleep(RENEW_EVERY)
            self._cache.renew()

    async def _judge(self, task: Task) -> Judgement:
        example, response = task
        asked = requests(example, response, mode=self.config.judge_mode, strictness=self.config.judge_strictness)
        # Wait for all of them before raising an error, because their replies are paid for.
        results = await asyncio.gather(*(self._ask(request) for request in asked), return_exceptions=True)
        outcomes: list[Outcome] = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            outcomes.append(result)
        verdicts = join([_verdicts(request, o) for request, o in zip(asked, outcomes, strict=True)])
        return Judgement(
            verdicts=[verdicts[i] for i in range(1, len(example.rubric) + 1)],
            replies=tuple(o.reply for o in outcomes),
            usage=sum((o.usage for o in outcomes), Usage()),
            problem=next((o.problem for o in outcomes if o.problem), ""),
        )

    async def _ask_freely(self, question: Question) -> Any:
        return (await self._ask(question)).value

    async def _ask(self, asked: Request | Question) -> Outcome:
        """The reply from the cache, or else from the judge."""
        if self._cache is None:
            return await self._request(asked, key="")
        key = self._key(asked)
        stored = await self._wait_for(key, self._cache)
        if stored is not None and isinstance(stored.get("code"), str):
            try:
                return Outcome(asked.read(stored["text"], stored["code"]), stored["text"], Usage(cached=1))
            except UnusableReply:  # stored by a version that read replies differently
                pass
        try:
            return await self._request(asked, key)
        finally:
            self._cache.release(key)

    async def _wait_for(self, key: str, cache: ReplyCache) -> dict[str, Any] | None:
        """The stored reply, or None together with the claim to request it."""
        start = time.monotonic()
        while True:
            stored = cache.get(key)
            if stored is not None:
                return stored
            if cache.claim(key):
                # Another process may have stored it between `get` and `claim`.
                stored = cache.get(key)
                if stored is not None:
                    cache.release(key)
                return stored
            if self._client.stopped_by is not None:
                raise self._client.stopped_by
            if not self._wait_is_announced and time.monotonic() - start > ANNOUNCE_AFTER:
                self._wait_is_announced = True
                say(
                    f"  waiting for a reply that {cache.holder(key)} has requested; if that process has died, its "
                    f"claim expires within {LEASE:.0f} s"
                )
            await asyncio.sleep(POLL_EVERY)

    async def _request(self, asked: Request | Question, key: str) -> Outcome:
        """Ask until a reply is usable, with at most `judge_reasks` repetitions, and store the reply under `key`.

        Unusable replies are stored too and count as tries: a process that was killed between two tries does not pay for
        the first again. They are deleted after the last try, so that a later command can ask again.
        """
        # One code for all tries: a stored unusable reply keeps its own.
        code = new_code()
        stored = self._cache.unusable(key) if self._cache else []
        outcome = Outcome()
        # Tries that a killed process had stored come first, at no cost.
        for attempt in range(self.config.judge_reasks + 1):
            if attempt < len(stored):
                reply, usage = JudgeReply(**stored[attempt]), Usage(cached=1)
            else:
                try:
                    answer = await self._send(asked, code)
                except ChatFault as fault:
                    usage = outcome.usage + fault.usage
                    return replace(outcome, usage=usage, problem=_label(fault), detail=str(fault))
                reply, usage = JudgeReply.of(answer, code), answer.usage
            usage += outcome.usage
            try:
                value = reply.value(asked)
            except UnusableReply as error:
                outcome = Outcome(None, reply.text, usage, error.problem, str(error))
                if self._cache and attempt >= len(stored):
                    stored = [*stored, asdict(reply)]
                    self._cache.put_unusable(key, stored)
                continue
            if self._cache:
                self._cache.put(key, {"text": reply.text, "code": reply.code, "model": self.model})
            return Outcome(value, reply.text, usage)
        if self._cache:
            self._cache.put_unusable(key, [])
        return outcome

    async def _send(self, asked: Request | Question, code: str) -> ChatReply:
        """Send one request.

        Raises:
            ChatFault: If this request failed.
            JudgeError: If every further request would fail too.
        """
        # While one request runs the test, the others wait for its result at the lock.
        if not self._is_tested or self._test_lock.locked():
            await self._test()
        try:
            return await self._client.ask(self._body(asked, code))
        except ChatFault as fault:
            error = self._final_error(fault)
            if error is None:
                raise
            raise error from fault

    async def _test(self) -> None:
        async with self._test_lock:
            if self._is_tested:
                return
            self._is_tested = True
            try:
                if self._unreachable is not None:
                    raise self._unreachable
                await self._try_call()
            except JudgeError as error:
                self._client.stop(error)  # so that requests that wait for the test are not sent
                raise

    async def _try_call(self) -> None:
        (request, *_) = requests(_TEST_EXAMPLE, "Hello!", mode=self.config.judge_mode)
        until = time.monotonic() + TEST_SECONDS
        for attempt in range(1, TEST_TRIES + 1):
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await self._client.ask(self._body(request, new_code()), retries=0)
                return
            except TimeoutError:
                raise self._no_answer(f"no reply within {TEST_SECONDS:g} s") from None
            except ChatFault as fault:
                # Both prove that key, model and address are right.
                if fault.problem in (Problem.RATE_LIMIT, Problem.REFUSAL):
                    return
                if (error := self._final_error(fault)) is not None:
                    raise error from fault
                wait = min(fault.retry_after or 1.0, TEST_SECONDS)
                if not fault.is_transient or attempt == TEST_TRIES or time.monotonic() + wait > until:
                    raise self._no_answer(f"{fault.problem}: {fault}") from fault
            await asyncio.sleep(wait)

    # Errors.

    def _final_error(self, fault: ChatFault) -> JudgeError | None:
        """The error, if every further request would fail like this one."""
        what = f"the judge {self.model!r} cannot be asked"
        kept = "Judgements so far are kept"
        # A refused schema would make every request fail, although this problem usually concerns a single one.
        if fault.problem is Problem.BAD_REQUEST and any(w in str(fault) for w in ("response_format", "json_schema")):
            return JudgeError(
                f"the judge's server does not support JSON schemas ({fault}): set judge_structured false, and run again"
            )
        if fault.problem is Problem.NO_KEY:
            return JudgeError(
                f"{what}: the key is missing ({fault}). Set {self._key_variable} or the provider's own variable, then "
                "run again"
            )
        if fault.problem is Problem.WAIT_TOO_LONG:
            return JudgeError(f"{what}: {fault}. {kept}: run the same command again later")
        if fault.is_final:
            return JudgeError(
                f"{what}: {_WHY[fault.problem]} ({fault}). Check judge, judge_api_base and the key in "
                f"{self._key_variable}, then run again. {kept}"
            )
        if fault.is_transient and self._client.has_given_up:
            return JudgeError(
                f"the judge {self.model!r} failed {self._client.failures_in_a_row} times in a row, last with: {fault}. "
                f"{kept}. Check that the server is up and allows judge_concurrency {self.config.judge_concurrency}, "
                "then run the same command again"
            )
        return None

    def _no_answer(self, why: str) -> JudgeUnreachable:
        where = without_url_credentials(self.config.judge_api_base) if self.config.judge_api_base else "its provider"
        return JudgeUnreachable(
            f"the judge {self.model!r} at {where} did not answer a test call ({why}). Check judge, judge_api_base and "
            "that the server is up, then run again; for a slow judge, judge_test_call false skips this call"
        )

    # Settings.

    def _transport(self) -> Transport:
        c = self.config
        if c.judge_api_base:
            # Read no other variable: a provider's key in the environment must never reach a server of another owner.
            base = parse_api_base(c.judge_api_base, "judge_api_base")
            return HTTPTransport(base, read_key(self._key_variable), connections=c.judge_concurrency)
        return LiteLLMTransport(os.environ.get(self._key_variable))

    def _body(self, asked: Request | Question, code: str) -> dict[str, Any]:
        c = self.config
        system, user = asked.texts(code)
        body: dict[str, Any] = {
            "model": c.judge,
            "messages": [{"role": "system", "content": system}, {"role": "user", "content": user}],
        }
        optional = {
            "temperature": c.judge_temperature,
            "max_tokens": c.judge_max_tokens,
            "reasoning_effort": c.judge_reasoning_effort,
        }
        # Unset fields are left out: some models refuse fields that they do not know.
        body |= {name: value for name, value in optional.items() if value is not None}
        if c.judge_structured:
            described = {"name": "reply", "strict": True, "schema": asked.schema}
            body["response_format"] = {"type": "json_schema", "json_schema": described}
        return body

    @property
    def _key_variable(self) -> str:
        return self.config.judge_api_key_env or "RGSD_JUDGE_API_KEY"

    @property
    def identity(self) -> list[Any]:
        """What verdicts depend on besides the texts that the judge reads. Part of the key of stored verdicts."""
        c = self.config
        return [
            PROMPT_VERSION, self.model, c.judge_api_base, c.judge_mode, c.judge_strictness, c.judge_temperature,
            c.judge_max_tokens, c.judge_reasoning_effort, c.judge_structured, c.judge_sample,
        ]  # fmt: skip

    def _key(self, asked: Request | Question) -> str:
        """The key of a cached reply: a digest of everything that it depends on except the code."""
        c = self.config
        # The code is random, so the key is made of the texts without it.
        system, user = asked.texts("")
        schema = asked.schema if c.judge_structured else None
        parts = [
            PROMPT_VERSION, self.model, c.judge_api_base and without_url_credentials(c.judge_api_base), system, user,
            schema, c.judge_temperature, c.judge_max_tokens, c.judge_reasoning_effort, c.judge_sample,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


_TEST_EXAMPLE = Example(
    "test call", ({"role": "user", "content": "Say hello."},), Rubric((Criterion("Says hello.", 1.0),))
)

_WHY = {
    Problem.DENIED: "the key was refused or may not use it",
    Problem.NOT_FOUND: "there is no such model or address",
    Problem.NO_CREDIT: "the account has no credit",
    Problem.REDIRECT: "the server redirects to another address",
}


def _verdicts(request: Request, outcome: Outcome) -> dict[int, Any]:
    if outcome.value is not None:
        return outcome.value
    missing = unscored(len(request.ids), outcome.problem, outcome.detail)
    return dict(zip(request.ids, missing, strict=True))


def _label(fault: ChatFault) -> str:
    return f"server error {fault.status}" if fault.problem is Problem.SERVER else fault.problem.value


def _account(config: JudgeConfig, model: str) -> Account:
    """The prices and limits of a judge.

    Raises:
        ConfigError: If judge_budget is set and nothing bounds the cost of a request.
    """
    listed = listed_model(model)
    prices = highest = None
    if config.judge_price_input is not None and config.judge_price_output is not None:
        prices = highest = Prices(config.judge_price_input, config.judge_price_output)
    elif listed is not None:
        # LiteLLM computes the price of a provider's reply itself, since it knows about cached and long prompts.
        prices, highest = (listed.prices if config.judge_api_base else None), listed.highest
    account = Account(prices, Budget(config.judge_max_calls, config.judge_budget))
    if config.judge_budget is None:
        return account
    if highest is None:
        raise ConfigError(
            f"judge_budget is set, but the price of {model!r} is unknown: set judge_price_input and "
            "judge_price_output (dollars per million tokens), or limit judge_max_calls instead"
        )
    max_tokens = config.judge_max_tokens or (listed.max_output_tokens if listed else None)
    if max_tokens is None:
        raise ConfigError(
            "judge_budget is set, but nothing bounds the length of a reply and so its cost: set judge_max_tokens, e.g. "
            "to 4096"
        )
    return replace(account, bound=Bound(highest, max_tokens))
