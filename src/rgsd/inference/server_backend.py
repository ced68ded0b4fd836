"""A server that speaks OpenAI's protocol: its requests, their faults, and what each refusal means."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any

from rgsd.errors import ConfigError, ModelError, PromptTooLong, RGSDError
from rgsd.inference.interface import (
    Conversation,
    Done,
    Response,
    ResponseKey,
    described,
    prompt_seed,
    response_keys,
)
from rgsd.inference.sampling import SamplingConfig
from rgsd.progress import say
from rgsd.redaction import redact, redact_known, remember, remember_settings

if TYPE_CHECKING:
    import httpx

DEFAULT_KEY_ENV = "RGSD_API_KEY"
"""The variable that holds a server's key where no other is named."""
MAX_RETRY_AFTER = 600.0
"""Longest `Retry-After` that is waited for, in seconds."""
PROBE_TIMEOUT = 10.0
"""Seconds that the server has to list its models before we go on without."""
TRANSIENT_STATUS = frozenset({408, 409, 425, 429})
"""Besides all of 500 and above: refusals that another try may cure."""
UNFINISHED = frozenset({"error", "abort", "cancelled"})
"""Values of finish_reason that say that the server, not the model, ended the text."""
NEUTRAL_SAMPLING: Mapping[str, Mapping[str, Any]] = {
    "vllm": {"repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0},
    "sglang": {"repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0},
    "llamacpp": {"repeat_penalty": 1.0, "top_k": 0, "min_p": 0.0},
}
"""By what a server calls the owner of its models: fields outside of OpenAI's that switch off its own sampling defaults,
among them those that it takes from the checkpoint's generation_config. Other servers might refuse such fields."""


class _Transient(Exception):
    """A fault of the server or the network that another try may cure; `wait`: what `Retry-After` asks for, in s."""

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


class _GivenUp(Exception):
    """A prompt that got no response in all the tries it was allowed."""


class _Stopped(Exception):
    """No further request is to be begun."""


class ServerGenerator:
    """Any server with an OpenAI-compatible /chat/completions: vLLM's, SGLang's, llama.cpp's, `transformers serve`, or a
    provider's.

    Spoken to with httpx, which transformers brings along: one POST needs no client library, and this way retries,
    waiting and time-outs are in one place and nothing is sent twice behind our back.

    A fault of the server or the network is tried again; a request that no further try can save (a refused key, an
    unknown model, a refused field, a prompt too long) ends it: no request is begun any more, those in flight are waited
    for, and the error is raised. A prompt that got no response in all its tries does not keep the others from theirs;
    the error comes last. Either way all responses have been passed to `done`.

    vLLM's, SGLang's and llama.cpp's servers are told to leave out their own sampling defaults (`NEUTRAL_SAMPLING`), and
    are recognized by their list of models. `transformers serve` takes a checkpoint's repetition_penalty even then: give
    it extra_body={"frequency_penalty": 0.0}, which it reads as none.

    Args:
        model: what the server calls it.
        api_base: the server's address, up to and including /v1.
        max_new_tokens: longest response, in tokens.
        api_key_env: environment variable with the key. None: RGSD_API_KEY, if it is set; else no key is sent.
        temperature: 0 is greedy; None leaves it to the server (models that refuse the field).
        top_p: sent only where the temperature is not 0.
        seed: sent as it is where the temperature is 0, else joined with the prompt; None sends none.
        concurrency: requests in flight at once.
        timeout: seconds for one request, from its begin to the last byte of the reply.
        retries: how often a request is sent again.
        retry_first_wait, retry_max_wait: pause before the first of these, doubled each time, and its upper bound, in
            seconds; a random part of up to a half is taken off. A `Retry-After` takes its place, for all requests.
        give_up_after: end it when so many prompts in a row got no response in all their tries.
        chat_template_kwargs: sent on where given; vLLM's, SGLang's, llama.cpp's and transformers' servers take it.
        extra_body: more fields of the request, which win over all others.
        think_open_tag, think_close_tag: put around reasoning that the server has split off.
        prompt_opens_thinking: whether the chat template ends in the open tag (Qwen3-Thinking-2507) and the server does
            not split reasoning off: then a response that was cut off before the close tag is all reasoning.

    Raises:
        ConfigError: for a setting out of range, an address that is none, or a key that is not there.
        ModelError: from `generate`: when the server refuses, or some prompts got no response.
        PromptTooLong: from `generate`: when the server says that a prompt exceeds its context.
    """

    def __init__(
        self,
        model: str,
        sampling: SamplingConfig,
        *,
        api_base: str,
        api_key_env: str | None = None,
        concurrency: int = 16,
        timeout: float = 600.0,
        retries: int = 6,
        retry_first_wait: float = 1.0,
        retry_max_wait: float = 60.0,
        give_up_after: int = 20,
        extra_body: Mapping[str, Any] | None = None,
        prompt_opens_thinking: bool = False,
    ) -> None:
        for name, value, least in (
            ("concurrency", concurrency, 1),
            ("timeout", timeout, 0.001),
            ("retries", retries, 0),
            ("retry_first_wait", retry_first_wait, 0.0),
            ("retry_max_wait", retry_max_wait, 0.0),
            ("give_up_after", give_up_after, 1),
        ):
            if value < least:
                raise ConfigError(f"{name} is {value}, at least {least} is wanted")
        self.model, self.sampling = model, sampling
        self.concurrency, self.timeout, self.give_up_after = concurrency, timeout, give_up_after
        self.retries, self.retry_first_wait, self.retry_max_wait = retries, retry_first_wait, retry_max_wait
        self.extra_body = dict(extra_body or {})
        self.prompt_opens_thinking = prompt_opens_thinking
        self.key_env = api_key_env or DEFAULT_KEY_ENV
        self._key = _key(self.key_env, is_wanted=api_key_env is not None)
        remember(self._key)
        remember_settings([api_base, self.extra_body])
        self._base = _address(api_base)
        self.name = f"server:{model}"

    @property
    def address(self) -> str:
        """The server's address for messages: without user, password or query."""
        return str(self._base.copy_with(userinfo=b"", query=None))

    def generate(self, prompts: Sequence[Conversation], done: Done | None = None) -> list[Response]:
        """See `Generator.generate`; `done` is called response by response, as they come."""
        if not prompts:
            return []
        found: dict[int, Response] = {}

        def keep(i: int, response: Response) -> None:
            found[i] = response
            if done is not None:
                done(i, response)

        errand = _Errand(self, prompts)
        errand.start()
        try:
            while (item := errand.results.get()) is not None:
                keep(*item)
        except KeyboardInterrupt:
            errand.cancel()
            for item in errand.left():  # these have been paid for
                keep(*item)
            raise
        finally:
            errand.cancel()
        self._warn_of_unmarked_reasoning(list(found.values()))
        errand.raise_problem()
        return [found[i] for i in range(len(prompts))]

    def keys(self, prompts: Sequence[Conversation]) -> list[ResponseKey]:
        """See `Generator.keys`. A server does not say which weights it serves: its address and the model's name stand
        for them, so that other weights under the same name go unnoticed."""
        body = {k: v for k, v in self._body([], {}).items() if k != "messages"}
        settings = {**body, "backend": "server", "opens": self.prompt_opens_thinking, "tags": self.sampling.think_tags}
        sent = [[[m["role"], m["content"]] for m in p] for p in prompts]
        return response_keys(f"{self.name} at {self.address}", settings, sent, self.sampling.temperature)

    def _warn_of_unmarked_reasoning(self, responses: Sequence[Response]) -> None:
        """Say so when responses that were cut off may be reasoning that nothing marks as such."""
        open_tag, close_tag = self.sampling.think_tags
        unopened = [r for r in responses if not r.starts_in_thinking and open_tag not in r.text]
        n_cut = sum(r.is_truncated and close_tag not in r.text for r in unopened)
        if n_cut and any(close_tag in r.text for r in unopened):
            say(
                f"  {self.model} closes reasoning that its prompt opened, and {n_cut} responses were cut off before "
                "they closed it: these count as answers. Raise max_new_tokens, give the server a reasoning parser, or "
                "set prompt_opens_thinking"
            )

    def _body(self, prompt: Conversation, neutral: Mapping[str, Any]) -> dict[str, Any]:
        """The request, as OpenAI defines it, and what this server needs besides."""
        is_greedy = self.sampling.is_greedy
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": m["role"], "content": m["content"]} for m in prompt],
            "max_tokens": self.sampling.max_new_tokens,
        }
        if self.sampling.temperature is not None:
            body["temperature"] = self.sampling.temperature
        if not is_greedy:
            body["top_p"] = self.sampling.top_p
        if self.sampling.seed is not None:
            body["seed"] = self.sampling.seed if is_greedy else prompt_seed(self.sampling.seed, prompt)
        if self.sampling.chat_template_kwargs:
            body["chat_template_kwargs"] = self.sampling.chat_template_kwargs
        return {**body, **neutral, **self.sampling.filters, **self.extra_body}

    def _response(self, data: Any) -> Response:
        """A chat completion as a response.

        Raises:
            _Transient: when it is none.
        """
        try:
            if "error" in data and not data.get("choices"):
                raise _Transient(f"an error in place of a reply: {_squashed(json.dumps(data['error']))}")
            choice = data["choices"][0]
            message, finish_reason = choice["message"], choice.get("finish_reason")
            n_tokens = data["usage"]["completion_tokens"]
            content = message.get("content")
            refusal, reasoning = message.get("refusal"), message.get("reasoning_content") or message.get("reasoning")
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise _Transient(f"not a chat completion with token counts ({error!r}): {_squashed(str(data))}") from error
        text = content if content is not None else refusal or ""
        if not isinstance(text, str) or not isinstance(n_tokens, int) or not isinstance(reasoning, str | None):
            raise _Transient(f"not a chat completion with token counts: {_squashed(str(data))}")
        if finish_reason in UNFINISHED:
            raise _Transient(f"the server ended the text itself (finish_reason {finish_reason!r})")
        is_truncated = finish_reason in ("length", "content_filter")
        starts_in_thinking = self.prompt_opens_thinking and not reasoning
        if reasoning:
            open_tag, close_tag = self.sampling.think_tags
            # Cut off before the answer began: the reasoning was never closed.
            text = f"{open_tag}{reasoning}" + ("" if is_truncated and not text else f"{close_tag}{text}")
        # A server may echo the key; a judge, perhaps another provider's, reads this text next.
        return Response(redact_known(text), n_tokens, is_truncated, starts_in_thinking)

    def _refused(self, status: int, detail: str, prompt: str, models: Sequence[str]) -> RGSDError:
        """What a refusal means and what to do."""
        what = f"the server at {self.address} refused {prompt} with status {status} ({detail})"
        kept = "Responses until then are kept"
        low = detail.lower()
        if "insufficient_quota" in low or status == 402:
            return ModelError(
                f"{what}: the account has no credit left. Add some and run the same command again. {kept}"
            )
        if status in (401, 403):
            sent = f"the key in {self.key_env}" if self._key else f"no key, since {self.key_env} is not set"
            return ModelError(
                f"{what}. It got {sent}; wanted one that may use {self.model!r}: set {self.key_env}. {kept}"
            )
        if status == 404:
            known = f"the server has {', '.join(models[:20])}" if models else "ask the server for its models"
            return ModelError(
                f"{what}: there is no model {self.model!r} or no /chat/completions there. Check the model ({known}) "
                f"and api_base, which mostly ends in /v1. {kept}"
            )
        if status == 413 or any(
            mark in low for mark in ("context length", "context_length", "context size", "too long")
        ):
            return PromptTooLong(
                f"{what}: prompt and max_new_tokens ({self.sampling.max_new_tokens:,}) exceed its context. Lower "
                f"max_new_tokens, leave the prompt out, or start the server with a longer context. Prompts are never "
                f"cut. {kept}"
            )
        if 300 <= status < 400:
            return ModelError(f"{what}: it points elsewhere. Set api_base to the address that it names. {kept}")
        return ModelError(
            f"{what}. If it names a field that it does not take: seed and temperature are left out when None, "
            f"chat_template_kwargs when unset, and extra_body adds others. {kept}"
        )


def _squashed(text: str, most: int = 300) -> str:
    """What a server said, on one line, without credentials, and cut only then: half a key would not be recognized."""
    text = " ".join(redact(text).split())
    return text if len(text) <= most else text[:most] + " ..."


def _key(variable: str, *, is_wanted: bool) -> str:
    """The key that an environment variable holds; "" where none is needed.

    Raises:
        ConfigError: when one is wanted and not there, or cannot be sent in a header. The key is not in the message.
    """
    key = os.environ.get(variable, "").strip()
    if not key and is_wanted:
        raise ConfigError(
            f"api_key_env names {variable}, which is not set: set it to the server's key, or leave it out"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"the value of {variable} is no key: it holds spaces, line breaks or letters beyond ASCII")
    return key


def _address(api_base: str) -> httpx.URL:
    import httpx

    try:
        url = httpx.URL(api_base)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError(f"api_base is no address ({error}): wanted e.g. http://localhost:8000/v1") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(
            "api_base is no address of a server: wanted http:// or https://, e.g. http://localhost:8000/v1"
        )
    path = url.path.rstrip("/").removesuffix("/chat/completions")
    return url.copy_with(path=path or "/")


def _below(base: httpx.URL, path: str) -> httpx.URL:
    return base.copy_with(path=base.path.rstrip("/") + path)


def _retry_after(value: str | None) -> float | None:
    """Seconds that a `Retry-After` asks for, given as seconds or as a date; None when it is neither."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


class _Errand:
    """One call of `ServerGenerator.generate`: its requests, in a thread and an event loop of their own.

    Attributes:
        results: positions and responses as they come; None after the last.
    """

    def __init__(self, settings: ServerGenerator, prompts: Sequence[Conversation]) -> None:
        self.settings, self.prompts = settings, prompts
        self.results: queue.SimpleQueue[tuple[int, Response] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="rgsd-generation", daemon=True)
        self._loop: asyncio.AbstractEventLoop = asyncio.new_event_loop()
        self._everything: asyncio.Task[None] | None = None
        self._problem: BaseException | None = None
        self._failed: dict[int, str] = {}
        self._failed_in_a_row = 0
        self._not_before = 0.0
        self._neutral: Mapping[str, Any] = {}
        self._models: list[str] = []
        self._limit_field = "max_tokens"

    # In the caller's thread.

    def start(self) -> None:
        self._thread.start()

    def cancel(self) -> None:
        """Drop whatever is in flight, and wait for the thread to end. Nothing happens when it has."""
        with suppress(RuntimeError):  # the loop is closed already
            self._loop.call_soon_threadsafe(self._cancel)
        self._thread.join()

    def left(self) -> list[tuple[int, Response]]:
        """Responses that came and were not taken yet, once it has ended."""
        items = []
        while not self.results.empty():
            items.append(self.results.get())
        return [item for item in items if item is not None]

    def raise_problem(self) -> None:
        """Raise what ended it early, or what kept some prompts from a response."""
        if self._problem is not None:
            raise self._problem
        if self._failed:
            first = min(self._failed)
            raise ModelError(
                f"{len(self._failed)} of {len(self.prompts)} prompts got no response from the server at "
                f"{self.settings.address} in {self.settings.retries + 1} tries each; "
                f"{described(first, self.prompts)}: {self._failed[first]}. The other responses are kept: "
                "look into the server, raise timeout or lower concurrency, and run the same command again"
            )

    # In the errand's thread.

    def _run(self) -> None:
        try:
            asyncio.set_event_loop(self._loop)
            self._everything = self._loop.create_task(self._all())
            self._loop.run_until_complete(self._everything)
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # raised in the caller's thread
            self._problem = self._problem or error
        finally:
            self._loop.close()
            self.results.put(None)

    def _cancel(self) -> None:
        if self._everything is not None:
            self._everything.cancel()

    async def _all(self) -> None:
        import httpx

        s = self.settings
        self._stopped = asyncio.Event()
        headers = {"Authorization": f"Bearer {s._key}"} if s._key else {}
        limits = httpx.Limits(max_connections=s.concurrency, max_keepalive_connections=s.concurrency)
        positions = iter(range(len(self.prompts)))
        async with httpx.AsyncClient(headers=headers, limits=limits, timeout=None) as client:
            await self._look(client)
            n_workers = min(s.concurrency, len(self.prompts))
            await asyncio.gather(*(self._work(client, positions) for _ in range(n_workers)))

    async def _look(self, client: httpx.AsyncClient) -> None:
        """Ask the server for its models, to know what kind of server it is. It need not answer."""
        import httpx

        try:
            async with asyncio.timeout(min(PROBE_TIMEOUT, self.settings.timeout)):
                reply = await client.get(_below(self.settings._base, "/models"))
            listed = [m for m in reply.json()["data"] if isinstance(m, dict)]
        except (TimeoutError, httpx.HTTPError, ValueError, KeyError, TypeError):
            return
        self._models = [str(m.get("id")) for m in listed]
        owners = {str(m.get("owned_by")) for m in listed if m.get("id") == self.settings.model or len(listed) == 1}
        self._neutral = next((NEUTRAL_SAMPLING[o] for o in owners if o in NEUTRAL_SAMPLING), {})

    async def _work(self, client: httpx.AsyncClient, positions: Iterator[int]) -> None:
        for i in positions:
            try:
                self.results.put((i, await self._answered(client, i)))
                self._failed_in_a_row = 0
            except _Stopped:
                return
            except _GivenUp as error:
                self._failed[i] = str(error)
                self._failed_in_a_row += 1
                if self._failed_in_a_row >= self.settings.give_up_after:
                    self._stop(
                        ModelError(
                            f"the server at {self.settings.address} failed {self._failed_in_a_row} prompts in a row, "
                            f"{self.settings.retries + 1} tries each, last with: {error}. Responses until then are "
                            "kept: see that the server is up, then run the same command again"
                        )
                    )
            except RGSDError as error:
                self._stop(error)

    def _stop(self, problem: RGSDError) -> None:
        self._problem = self._problem or problem
        self._stopped.set()

    async def _answered(self, client: httpx.AsyncClient, i: int) -> Response:
        """The response to one prompt, in as many tries as are allowed."""
        s, tries = self.settings, 0
        while True:
            while (wait := self._not_before - time.monotonic()) > 0:
                await self._sleep(wait)
            if self._stopped.is_set():
                raise _Stopped
            try:
                return await self._once(client, i)
            except _Transient as error:
                fault = error
            if tries == s.retries:
                raise _GivenUp(str(fault)) from fault
            if fault.wait is None:
                wait = min(s.retry_max_wait, s.retry_first_wait * 2**tries) * random.uniform(0.5, 1.0)
            else:
                self._hold(fault)
                wait = fault.wait * random.uniform(1.0, 1.1)
            tries += 1
            await self._sleep(wait)

    def _hold(self, fault: _Transient) -> None:
        """Let nobody ask before the time that the server named."""
        assert fault.wait is not None
        if fault.wait > MAX_RETRY_AFTER:
            raise ModelError(
                f"the server at {self.settings.address} asks to wait {fault.wait:,.0f} s ({fault}), more than the "
                f"{MAX_RETRY_AFTER:,.0f} s that are waited for. Responses until then are kept: run the same command "
                "again later"
            )
        self._not_before = max(self._not_before, time.monotonic() + fault.wait)

    async def _sleep(self, seconds: float) -> None:
        """Wait; or less, when it is all over."""
        try:
            async with asyncio.timeout(seconds):
                await self._stopped.wait()
        except TimeoutError:
            pass

    async def _once(self, client: httpx.AsyncClient, i: int) -> Response:
        """One request.

        Raises:
            _Transient: when another try may cure it.
            RGSDError: when none can.
        """
        import httpx

        s = self.settings
        body = s._body(self.prompts[i], self._neutral)
        if self._limit_field not in body:
            body[self._limit_field] = body.pop("max_tokens")
        try:
            async with asyncio.timeout(s.timeout):
                reply = await client.post(_below(s._base, "/chat/completions"), json=body)
        except TimeoutError as error:
            raise _Transient(f"no whole reply within {s.timeout:g} s") from error
        except httpx.TransportError as error:
            raise _Transient(redact(f"{type(error).__name__}: {error}")) from error
        if reply.status_code == 200:
            try:
                data = json.loads(reply.content)
            except ValueError as error:
                raise _Transient(f"a reply that is not JSON: {_squashed(reply.text, 80)!r}") from error
            return s._response(data)
        detail = self._detail(reply)
        is_quota = "insufficient_quota" in detail
        if (reply.status_code in TRANSIENT_STATUS or reply.status_code >= 500) and not is_quota:
            raise _Transient(f"status {reply.status_code} ({detail})", _retry_after(reply.headers.get("retry-after")))
        if "max_tokens" in body and "max_completion_tokens" in detail:
            self._limit_field = "max_completion_tokens"  # the name that OpenAI's newer models insist on
            return await self._once(client, i)
        raise s._refused(reply.status_code, detail, described(i, self.prompts), self._models)

    def _detail(self, reply: httpx.Response) -> str:
        """What the server said, in one line and without the key."""
        text = reply.text
        try:
            error = reply.json()
            error = error.get("error", error.get("detail", error))
            text = error if isinstance(error, str) else json.dumps(error, ensure_ascii=False)
            if isinstance(error, dict) and error.get("message"):
                code = error.get("code") or error.get("type")
                text = f"{error['message']}" + (f" [{code}]" if code else "")
        except (ValueError, AttributeError):
            pass
        return _squashed(text) or "no reason given"
