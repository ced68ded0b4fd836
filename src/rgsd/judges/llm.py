"""The LLM judge: requests through autorubric's client; caching, retries, accounting and refusal to guess are here.

autorubric (and LiteLLM under it) knows the providers, structured output and prices. Its own cache (pickles, keyed
without the server's address) and its own retries (blind to Retry-After and to half a reply) are switched off.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

from rgsd.errors import BudgetExhausted, ConfigError, JudgeError
from rgsd.judges.cache import LEASE, RENEW_EVERY, ReplyCache
from rgsd.judges.config import JudgeConfig
from rgsd.judges.judgement import Judgement, Task, Usage
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
from rgsd.redaction import redact, redact_known, remember, remember_settings, without_url_credentials
from rgsd.rubrics import Criterion, Example, Rubric, Verdict

FATAL_STATUS = {401: "the key was refused", 403: "access was denied", 404: "there is no such model or address"}
NO_CREDIT = ("insufficient_quota", "exceeded your current quota")
"""A 429 that no waiting cures: OpenAI's words for an empty account."""
NATIVE_STOPS = frozenset({"end_turn", "stop_sequence", "eos", "eos_token", "COMPLETE", "STOP", "completed"})
"""What providers call the end of a reply that ended by itself, where they do not call it "stop"."""
SECONDS_UNTIL_SAID = 5.0
"""How long a wait for another process is silent."""
TEST_SECONDS, TEST_TRIES = 15.0, 3
"""How long a test call may take in all, and how often it is sent."""
NO_KEY = ("api_key client option must be set", "missing credentials", "missing anthropic api key", "api key not found")
SECONDS_BETWEEN_LOOKS = 0.05
"""How often a process looks for a reply that another one is buying."""


class _Transient(Exception):
    """A fault of the server or the network: worth another try."""

    def __init__(self, problem: str, detail: str, wait: float | None = None) -> None:
        super().__init__(detail)
        self.problem, self.wait = problem, wait


@dataclass(frozen=True, slots=True)
class Question:
    """A free question to the judge.

    Args:
        texts: code -> the system's and the user's text. The code is drawn for each request; markers and ids carry it,
            so no text that the judge reads can know them.
        schema: of its reply, as JSON schema.
        read: (reply, code) -> what is wanted from it, or raises `UnusableReply`, upon which the judge is asked again.
    """

    texts: Callable[[str], tuple[str, str]]
    schema: dict[str, Any]
    read: Callable[[str, str], Any]


@dataclass(frozen=True, slots=True)
class _Reply:
    text: str
    usage: Usage
    finish_reason: str | None
    is_refusal: bool

    def checked(self) -> str:
        """Its text, when the judge ended it by itself.

        Raises:
            UnusableReply: otherwise. A reply that was cut off may end in the middle of a quotation, whatever it holds.
        """
        if self.is_refusal:
            raise UnusableReply("refusal", f"the judge declined: {self.text[:120]!r}")
        if self.finish_reason == "length":
            raise UnusableReply("cut", "the reply was cut off: raise judge_max_tokens")
        if self.finish_reason != "stop":
            raise UnusableReply("cut", f"the reply did not end by itself: finish_reason is {self.finish_reason!r}")
        return self.text


@dataclass(frozen=True, slots=True)
class _Part:
    """What one request came to."""

    verdicts: dict[int, Verdict]
    reply: str
    usage: Usage
    problem: str


class LLMJudge:
    """A language model as the judge.

    A reply that cannot be used, a refusal, a time-out: after the allowed tries the criteria that it was about are
    unscored, with the reason. Only what makes every further request pointless is an error.

    Raises:
        ConfigError: without the extra `judge`, or with a budget in dollars and no known price.
        JudgeError: from `judge` and `judge_all`, when the key is refused, the model is not there, or too many requests
            in a row failed; `BudgetExhausted` when the budget is spent. Everything judged until then has been passed to
            `done` and is in the cache.
    """

    def __init__(self, config: JudgeConfig) -> None:
        self.config = config
        remember(os.environ.get(self._key_variable()))
        remember_settings(config.judge_api_base)
        self._autorubric, self._litellm = _libraries()
        self.model = config.judge
        if config.judge_api_base and not config.judge.startswith("openai/"):
            self.model = f"openai/{config.judge}"
        marks = [config.judge_mode.replace("_", " ")]
        marks += [config.judge_strictness] if config.judge_strictness != "plain" else []
        marks += [f"sample {config.judge_sample}"] if config.judge_sample else []
        self.name = f"{config.judge} ({', '.join(marks)})"
        self.usage = Usage()
        self._check_price()
        self._clients: dict[str, Any] = {}
        path = config.cache_path()
        self._cache = ReplyCache(path) if path else None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._slots: asyncio.Semaphore | None = None
        self._in_flight = 0
        self._wait_is_said = False
        self._dearest = 0.0
        self._spent = 0.0
        self._failures = 0
        self._not_before = 0.0
        self._stop: JudgeError | None = None
        self._is_tested, self._test_lock = True, asyncio.Lock()
        atexit.register(self.close)

    def judge(self, example: Example, response: str) -> Judgement:
        """The judgement of one response."""
        return self.judge_all([(example, response)])[0]

    def judge_all(self, tasks: Sequence[Task], done: Callable[[int, Judgement], None] | None = None) -> list[Judgement]:
        """The judgements of many responses, in their order; at most `judge_concurrency` requests are in flight."""
        found: list[Judgement | None] = [None] * len(tasks)
        for i, judgement in self._run(self._judge, tasks):
            found[i] = judgement
            if done is not None:
                done(i, judgement)
        return [j for j in found if j is not None]

    def ask_all(self, questions: Sequence[Question], done: Callable[[int, Any], None] | None = None) -> list[Any]:
        """What was read from the replies to free questions, for audits that judge no criteria; None where the judge
        gave no reply that could be read. The same cache, retries, limits and accounting as `judge_all`."""
        found: list[Any] = [None] * len(questions)
        for i, value in self._run(self._ask_freely, questions):
            found[i] = value
            if done is not None:
                done(i, value)
        return found

    def test_call(self, *, lazily: bool = False) -> None:
        """Send one small request, so that a wrong key, model or address ends a command before it has done any work.

        Args:
            lazily: send it before the first request that the cache cannot answer, if there is one. For commands that
                do nothing but judge.

        Raises:
            JudgeError: within 20 seconds, with the server's reason.
        """
        if not self.config.judge_test_call:
            return
        self._is_tested = False
        if not lazily:
            self._stop = None
            asyncio.run_coroutine_threadsafe(self._test(), self._started()).result()

    def close(self) -> None:
        """Close the cache and stop the thread that talks to the server."""
        if self._loop is not None:
            loop, self._loop = self._loop, None
            asyncio.run_coroutine_threadsafe(_end_others(), loop).result(timeout=5)
            loop.call_soon_threadsafe(loop.stop)
        if self._cache is not None:
            self._cache.close()

    # The caller's thread and the loop's.

    def _run(self, work: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Do the work on every item in the loop's thread; yield positions and results here, as they come.

        After an error that ends it, no request is begun any more, those in flight are awaited, and it is raised last.
        """
        self._stop = None
        results: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        positions = iter(range(len(items)))

        async def worker() -> None:
            for i in positions:
                if self._stop is not None:
                    return
                try:
                    results.put((i, await work(items[i])))
                except JudgeError as error:
                    self._stop = self._stop or error

        async def everyone() -> None:
            renewing = asyncio.create_task(self._renew_claims())
            try:
                await asyncio.gather(*(worker() for _ in range(min(len(items), self.config.judge_concurrency))))
            finally:
                renewing.cancel()
                results.put(None)

        future = asyncio.run_coroutine_threadsafe(everyone(), self._started())
        try:
            while (item := results.get()) is not None:
                yield item
            future.result()
        finally:
            self._end(future)
        if self._stop is not None:
            raise self._stop

    def _end(self, future: Any) -> None:
        """Let requests in flight finish, since they are paid for, and begin no more; Ctrl-C drops them."""
        if future.done():
            return
        self._stop = self._stop or JudgeError("the judge was interrupted. What was judged is kept")
        if self._in_flight:
            say(f"  waiting for {self._in_flight} replies in flight; Ctrl-C drops them")
        try:
            future.exception(timeout=self.config.judge_timeout)
        except (TimeoutError, CancelledError):
            pass
        finally:
            future.cancel()

    async def _renew_claims(self) -> None:
        while self._cache is not None:
            await asyncio.sleep(RENEW_EVERY)
            self._cache.renew()

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name="rgsd-judge", daemon=True).start()
            self._slots = asyncio.Semaphore(self.config.judge_concurrency)
        return self._loop

    # In the loop's thread.

    async def _test(self) -> None:
        async with self._test_lock:
            if self._is_tested:
                return
            self._is_tested = True
            try:
                await self._tried()
            except JudgeError as error:
                self._stop = error  # those that wait for the test send nothing
                raise

    async def _tried(self) -> None:
        until = time.monotonic() + TEST_SECONDS
        for tried in range(1, TEST_TRIES + 1):
            try:
                async with asyncio.timeout(until - time.monotonic()):
                    await self._test_once()
                return
            except TimeoutError:
                raise self._no_answer(f"no reply within {TEST_SECONDS:g} s") from None
            except _Transient as fault:
                wait = min(fault.wait or 1.0, TEST_SECONDS)
                if tried == TEST_TRIES or time.monotonic() + wait > until:
                    raise self._no_answer(f"{fault.problem}: {fault}") from fault
            await asyncio.sleep(wait)

    async def _test_once(self) -> None:
        (request, *_) = requests(_TEST_EXAMPLE, "Hello!", mode=self.config.judge_mode)
        schema = request.schema if self.config.judge_structured else None
        try:
            await self._once(*request.texts(new_code()), schema, [])
        except _Transient as fault:
            if fault.problem != "rate limit":  # which is an answer: the key, the model and the address are right
                raise
        except _Failed as failure:
            if failure.problem != "refusal":
                raise self._no_answer(f"{failure.problem}: {failure}") from failure

    def _no_answer(self, why: str) -> JudgeError:
        where = without_url_credentials(self.config.judge_api_base) if self.config.judge_api_base else "its provider"
        return JudgeError(
            f"the judge {self.model!r} at {where} did not answer a test call ({why}). Check judge, judge_api_base and "
            "that the server is up, then run again; judge_test_call false skips this call for a judge that is slow"
        )

    async def _judge(self, task: Task) -> Judgement:
        example, response = task
        asked = requests(example, response, mode=self.config.judge_mode, strictness=self.config.judge_strictness)
        parts = await asyncio.gather(*(self._part(request) for request in asked), return_exceptions=True)
        for part in parts:
            if isinstance(part, BaseException):
                raise part
        whole: list[_Part] = [p for p in parts if isinstance(p, _Part)]
        verdicts = join([p.verdicts for p in whole])
        return Judgement(
            verdicts=[verdicts[i] for i in range(1, len(example.rubric) + 1)],
            replies=tuple(p.reply for p in whole),
            usage=sum((p.usage for p in whole), Usage()),
            problem=next((p.problem for p in whole if p.problem), ""),
        )

    async def _part(self, request: Request) -> _Part:
        usage, reply, value, problem, detail = await self._bought(request)
        if value is not None:
            return _Part(value, reply, usage, "")
        missing = unscored(len(request.ids), problem, detail)
        return _Part(dict(zip(request.ids, missing, strict=True)), reply, usage, problem)

    async def _ask_freely(self, question: Question) -> Any:
        return (await self._bought(question))[2]

    async def _bought(self, asked: Request | Question) -> tuple[Usage, str, Any, str, str]:
        """Usage, raw reply, what was read from it (or None), and the problem with its detail; from the cache when it is
        there, else bought and kept."""
        key = self._key(asked)
        kept = await self._wait_for(key)
        if kept is not None:
            try:
                return Usage(cached=1), kept["text"], asked.read(kept["text"], kept["code"]), "", ""
            except UnusableReply:  # kept by a version that read replies otherwise
                pass
        # Kept with the reply: the key is the same whatever the code, so that a rerun finds the reply.
        code = new_code()
        system, user = asked.texts(code)
        schema = asked.schema if self.config.judge_structured else None
        usage, text = Usage(), ""
        problem, detail = "", ""
        try:
            for _ in range(self.config.judge_reasks + 1):
                try:
                    reply, spent = await self._sent(system, user, schema)
                except _Failed as failure:
                    return usage + failure.usage, text, None, failure.problem, str(failure)
                usage, text = usage + spent, _stored(reply.text)
                try:
                    value = asked.read(reply.checked(), code)
                except UnusableReply as error:
                    problem, detail = error.problem, str(error)
                    continue
                if self._cache is not None:
                    kept = {"text": text, "code": code, "model": self.model, "usage": _plain(reply.usage)}
                    self._cache.put(key, kept)
                return usage, text, value, "", ""
        finally:
            if self._cache is not None:
                self._cache.release(key)
        return usage, text, None, problem, detail

    async def _wait_for(self, key: str) -> dict[str, Any] | None:
        """A kept reply, or None and the right to buy it."""
        if self._cache is None:
            return None
        start = time.monotonic()
        while True:
            kept = self._cache.get(key)
            if kept is not None:
                return kept
            if self._cache.claim(key):
                # It may have been bought between the look and the claim.
                kept = self._cache.get(key)
                if kept is not None:
                    self._cache.release(key)
                return kept
            if self._stop is not None:
                raise self._stop
            if not self._wait_is_said and time.monotonic() - start > SECONDS_UNTIL_SAID:
                self._wait_is_said = True
                say(
                    f"  waiting for a reply that {self._cache.holder(key)} is buying; should that process have died, "
                    f"its claim lapses within {LEASE:.0f} s"
                )
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)

    async def _sent(self, system: str, user: str, schema: dict[str, Any] | None) -> tuple[_Reply, Usage]:
        """A reply, after as many tries as are allowed; with the usage of all of them."""
        from tenacity import AsyncRetrying, RetryError, retry_if_exception_type, stop_after_attempt

        if not self._is_tested or self._test_lock.locked():
            await self._test()
        if self._stop is not None:
            raise self._stop
        used: list[Usage] = []
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception_type(_Transient),
                stop=stop_after_attempt(self.config.judge_retries + 1),
                wait=self._pause,
            ):
                with attempt:
                    reply = await self._once(system, user, schema, used)
                    self._failures = 0
                    return reply, sum(used, Usage())
        except RetryError as error:
            last: Any = error.last_attempt.exception()
            self._failures += 1
            if self._failures >= self.config.judge_give_up_after:
                raise JudgeError(
                    f"the judge {self.model!r} failed {self._failures} times in a row, last with: {last}. What was "
                    "judged is kept. See that the server is up and its limits allow "
                    f"judge_concurrency {self.config.judge_concurrency}, then run the same command again"
                ) from last
            raise _Failed(last.problem, str(last), sum(used, Usage())) from last
        except _Failed as failure:
            raise _Failed(failure.problem, str(failure), sum(used, Usage())) from failure
        raise AssertionError("unreachable: tenacity returns a reply or raises")

    def _pause(self, state: Any) -> float:
        """Seconds before the next try: what the server asked for, else exponential with jitter."""
        from tenacity import wait_random_exponential

        error: Any = state.outcome.exception()
        most = self.config.judge_retry_max_wait
        if error.wait is not None:
            return min(most, error.wait)
        return wait_random_exponential(multiplier=1, max=most)(state)

    async def _once(self, system: str, user: str, schema: dict[str, Any] | None, used: list[Usage]) -> _Reply:
        """One request. Adds its usage, whatever it came to."""
        assert self._slots is not None
        async with self._slots:
            # After a 429 nobody asks before the time that the server named.
            while (wait := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(min(wait, self.config.judge_retry_max_wait))
            self._check_budget()
            start = time.monotonic()
            self._in_flight += 1
            self.usage += Usage(calls=1)
            try:
                result = await asyncio.wait_for(
                    self._client(schema).generate(system, user, return_result=True), timeout=self.config.judge_timeout
                )
                usage = self._counted(result)
            except BaseException as error:
                used.append(Usage(calls=1, seconds=time.monotonic() - start))
                self.usage += Usage(seconds=used[-1].seconds)
                if isinstance(error, Exception):
                    raise self._explained(error) from error
                raise
            finally:
                self._in_flight -= 1
            spent = usage + Usage(seconds=time.monotonic() - start)
            used.append(spent + Usage(calls=1))
            self.usage += spent
            self._spent += usage.price or 0.0
            self._dearest = max(self._dearest, usage.price or 0.0)
        choice = result.raw_response.choices[0]
        refusal = (getattr(choice.message, "provider_specific_fields", None) or {}).get("refusal")
        declined = bool(refusal) or choice.finish_reason == "content_filter"
        text = redact_known(result.content or refusal or "")
        return _Reply(text, spent, _finish_reason(choice), declined)

    def _explained(self, error: Exception) -> Exception:
        """The error as a fault worth another try, as the end of this request, or as the end of all."""
        status = getattr(error, "status_code", None)
        text = " ".join(redact(str(error)).split())[:300]  # cut last: half a key would not be recognized
        low = text.lower()
        if isinstance(error, TimeoutError) or type(error).__name__ == "Timeout":
            return _Transient("timeout", f"no reply within {self.config.judge_timeout:g} s, or the connection was cut")
        if any(sign in low for sign in NO_KEY):  # LiteLLM calls it a server error
            return JudgeError(
                f"the judge {self.model!r} cannot be asked: there is no key ({text}). Put it into "
                f"{self._key_variable()} or the provider's own variable, then run again"
            )
        if status in FATAL_STATUS or any(sign in low for sign in NO_CREDIT):
            why = FATAL_STATUS.get(status or 0, "the account has no credit")
            return JudgeError(
                f"the judge {self.model!r} cannot be asked: {why} ({text}). Check judge, judge_api_base and the key in "
                f"{self._key_variable()}, then run again: what was judged is kept"
            )
        if status == 429:
            wait = _retry_after(error)
            if wait is not None:
                until = time.monotonic() + min(wait, self.config.judge_retry_max_wait)
                self._not_before = max(self._not_before, until)
            return _Transient("rate limit", text, wait)
        if type(error).__name__ == "ContextWindowExceededError":
            return _Failed("too long", f"prompt, response and rubric exceed the judge's context: {text}", Usage())
        if type(error).__name__ == "ContentPolicyViolationError":
            return _Failed("refusal", text, Usage())
        if status in (400, 422):
            if "response_format" in low or "json_schema" in low:
                return JudgeError(
                    f"the judge's server takes no JSON schema ({text}): set judge_structured to false, and run again"
                )
            return _Failed("bad request", text, Usage())
        if (refused := _not_connected(error)) is not None:
            return _Transient("connection", " ".join(redact(refused).split())[:300])
        if isinstance(error, self._litellm.exceptions.APIConnectionError):
            return _Transient("connection", text, None)
        if status is not None:
            return _Transient(f"server error {status}", text, _retry_after(error))
        if isinstance(error, LookupError | AttributeError | TypeError | ValueError | OSError):
            return _Transient("malformed", f"not a chat completion: {type(error).__name__}: {text}")
        return error

    def _counted(self, result: Any) -> Usage:
        usage, c = result.usage, self.config
        price = result.cost
        if c.judge_price_input is not None and c.judge_price_output is not None:
            price = (usage.prompt_tokens * c.judge_price_input + usage.completion_tokens * c.judge_price_output) / 1e6
        elif not price and c.judge_api_base:
            price = None
        return Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens, price=price)

    # Settings.

    def _check_budget(self) -> None:
        if self._stop is not None:
            raise self._stop
        calls, dollars = self.config.judge_max_calls, self.config.judge_budget
        if calls is not None and self.usage.calls >= calls:
            raise BudgetExhausted(
                f"judge_max_calls is {calls}, and all were sent. What was judged is kept: raise it and run again"
            )
        if dollars is not None and self._spent + self._in_flight * self._dearest >= dollars:
            raise BudgetExhausted(
                f"judge_budget is {dollars:g} dollars; {self._spent:.4f} are spent and {self._in_flight} requests "
                "are in flight. What was judged is kept: raise it and run again"
            )

    def _check_price(self) -> None:
        if self.config.judge_budget is None or self.config.judge_price_input is not None:
            return
        try:
            prices = self._litellm.cost_per_token(model=self.model, prompt_tokens=1, completion_tokens=1)
        except Exception as error:  # whatever LiteLLM raises for a model that it does not know
            raise ConfigError(
                f"judge_budget is set, but the price of {self.model!r} is not known: set judge_price_input and "
                "judge_price_output (dollars per million tokens), or limit judge_max_calls instead"
            ) from error
        if not any(prices):
            raise ConfigError(
                f"judge_budget is set, but the price table has no price for {self.model!r}: set judge_price_input and "
                "judge_price_output (dollars per million tokens), or limit judge_max_calls instead"
            )

    def _client(self, schema: dict[str, Any] | None) -> Any:
        """autorubric's client for replies of this form."""
        form = json.dumps(schema, sort_keys=True)
        if form in self._clients:
            return self._clients[form]
        c = self.config
        key = os.environ.get(self._key_variable())
        if key is None and c.judge_api_base:
            key = "none"  # a provider's key from the environment must not go to another server
        extra: dict[str, Any] = {"max_retries": 0}  # LiteLLM's own: every request is counted here
        if schema is not None:
            # As a plain parameter: given as a type, a reply in prose would be lost to an exception.
            described = {"name": "reply", "strict": True, "schema": schema}
            extra["response_format"] = {"type": "json_schema", "json_schema": described}
        self._clients[form] = self._autorubric.LLMClient(
            self._autorubric.LLMConfig(
                model=self.model,
                temperature=c.judge_temperature,
                max_tokens=c.judge_max_tokens,
                timeout=c.judge_timeout,
                max_retries=1,
                api_key=key,
                api_base=c.judge_api_base,
                thinking=c.judge_reasoning_effort,
                cache_enabled=False,
                extra_params=extra,
            )
        )
        return self._clients[form]

    def _key_variable(self) -> str:
        return self.config.judge_api_key_env or "RGSD_JUDGE_API_KEY"

    @property
    def identity(self) -> list[Any]:
        """What its verdicts depend on, besides what it reads: for keys of stored verdicts."""
        c = self.config
        return [
            PROMPT_VERSION, self.model, c.judge_api_base, c.judge_mode, c.judge_strictness, c.judge_temperature,
            c.judge_max_tokens, c.judge_reasoning_effort, c.judge_structured, c.judge_sample,
        ]  # fmt: skip

    def _key(self, asked: Request | Question) -> str:
        """Everything that a reply depends on but the code."""
        c = self.config
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


def _not_connected(error: BaseException) -> str | None:
    """Why no connection came about, if that is what an error is about: LiteLLM calls it a server error."""
    import httpx

    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return None
        if isinstance(seen, httpx.ConnectError | httpx.ConnectTimeout | ConnectionRefusedError):
            return f"no connection: {seen}"
        seen = seen.__cause__ or seen.__context__
    return None


def _finish_reason(choice: Any) -> str | None:
    """Why a reply ended. LiteLLM says "stop" for a reason that it does not know, and puts that one beside it."""
    native = (getattr(choice, "provider_specific_fields", None) or {}).get("native_finish_reason")
    if choice.finish_reason == "stop" and native is not None and native not in NATIVE_STOPS:
        return str(native)
    return choice.finish_reason


def _stored(text: str) -> str:
    """A reply as it is kept: whole, unless it is too long to be one."""
    return text if len(text) <= MAX_REPLY_CHARS else text[:1000] + " [...]"


async def _end_others() -> None:
    """End what libraries left running in this loop (LiteLLM's logging)."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class _Failed(Exception):
    """A request that came to nothing, finally."""

    def __init__(self, problem: str, detail: str, usage: Usage) -> None:
        super().__init__(detail)
        self.problem, self.usage = problem, usage


def _retry_after(error: Exception) -> float | None:
    headers = getattr(error, "litellm_response_headers", None) or getattr(
        getattr(error, "response", None), "headers", None
    )
    value = headers.get("retry-after") if headers else None
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        from email.utils import parsedate_to_datetime

        try:
            return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
        except (TypeError, ValueError):
            return None


def _plain(usage: Usage) -> dict[str, Any]:
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens, "price": usage.price}


def _libraries() -> tuple[Any, Any]:
    # LiteLLM otherwise fetches its price table from the network when it is imported; the one it ships is used.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    try:
        import autorubric
        import litellm
    except ImportError as error:
        raise ConfigError(
            f"an LLM judge needs the extra `judge` ({error}): pip install 'rgsd[judge]', or use --judge checks"
        ) from error
    loose: Any = litellm
    loose.suppress_debug_info = True
    loose.telemetry = False
    return autorubric, litellm
