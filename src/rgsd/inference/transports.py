"""How a chat request reaches a model: over HTTP to an OpenAI-compatible server, or through LiteLLM to a provider.

A transport sends one request and returns its reply or raises a `ChatFault`. It retries nothing: `ChatClient` does.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol

from rgsd.errors import ConfigError
from rgsd.inference.accounting import Usage
from rgsd.redaction import redact, redact_known

if TYPE_CHECKING:
    import httpx

MAX_REPLY_BYTES = 8 * 2**20
"""Largest reply that is read, in bytes. A response of 128k tokens has less than 1 MiB."""
MAX_TOKENS = 10**9
"""Most tokens that a server may say it has read or written."""
TRANSIENT_STATUS = frozenset({408, 409, 425, 429})
"""Statuses below 500 that another try may cure."""
NATIVE_STOPS = frozenset({"end_turn", "stop_sequence", "eos", "eos_token", "COMPLETE", "STOP", "completed"})
"""What some servers call `stop`."""
NO_CREDIT = ("insufficient_quota", "exceeded your current quota")
NO_KEY = ("api_key client option must be set", "missing credentials", "missing anthropic api key", "api key not found")
TOO_LONG = ("context length", "context_length", "context size", "context window", "too long")
REFUSED = ("content_policy_violation", "content_filter", "content management policy")


class Problem(StrEnum):
    """Why a request got no reply."""

    TIMEOUT = "timeout"
    CONNECTION = "connection"
    RATE_LIMIT = "rate limit"
    SERVER = "server error"
    MALFORMED = "malformed"
    UNFINISHED = "unfinished"
    TOO_LONG = "too long"
    REPLY_TOO_LARGE = "reply too large"
    REFUSAL = "refusal"
    BAD_REQUEST = "bad request"
    NO_KEY = "no key"
    DENIED = "denied"
    NOT_FOUND = "not found"
    NO_CREDIT = "no credit"
    REDIRECT = "redirect"
    WAIT_TOO_LONG = "wait too long"


TRANSIENT = frozenset(
    {Problem.TIMEOUT, Problem.CONNECTION, Problem.RATE_LIMIT, Problem.SERVER, Problem.MALFORMED, Problem.UNFINISHED}
)
"""Problems that another try may cure."""
FINAL = frozenset(
    {Problem.NO_KEY, Problem.DENIED, Problem.NOT_FOUND, Problem.NO_CREDIT, Problem.REDIRECT, Problem.WAIT_TOO_LONG}
)
"""Problems that every further request would meet too."""
MAYBE_BILLED = frozenset(
    {Problem.TIMEOUT, Problem.CONNECTION, Problem.MALFORMED, Problem.UNFINISHED, Problem.REPLY_TOO_LARGE}
)
"""Problems after which the model may have answered, and the answer may be billed."""


class ChatFault(Exception):
    """A request that got no reply. Its text is one line without credentials.

    Args:
        problem: The kind of problem.
        detail: What the server or the library reported.
        status: The HTTP status, if there was a reply.
        retry_after: Seconds that the server asks to wait.
        was_sent: False if no connection came about.
    """

    def __init__(
        self,
        problem: Problem,
        detail: str,
        *,
        status: int | None = None,
        retry_after: float | None = None,
        was_sent: bool = True,
    ) -> None:
        super().__init__(one_line(detail))
        self.problem, self.status, self.retry_after, self.was_sent = problem, status, retry_after, was_sent
        self.usage = Usage()
        """The usage of all tries; set by `ChatClient`."""

    @property
    def is_transient(self) -> bool:
        """Whether another try may succeed."""
        return self.problem in TRANSIENT

    @property
    def is_final(self) -> bool:
        """Whether every further request would fail in the same way."""
        return self.problem in FINAL

    @property
    def may_be_billed(self) -> bool:
        """Whether the provider may charge for the request."""
        return self.was_sent and self.problem in MAYBE_BILLED


@dataclass(frozen=True, slots=True)
class ChatReply:
    """A chat completion, without known credentials: a server may echo the key that it was sent.

    Args:
        text: The message's content; None if the server sent null.
        reasoning: Reasoning that the server split off.
        refusal: The model's refusal.
        finish_reason: Why the reply ended. None if the server did not say.
        prompt_tokens, completion_tokens: None if the server did not count them.
        price: In US dollars, if the transport knows it.
        usage: The usage of all tries; set by `ChatClient`.
    """

    text: str | None
    reasoning: str = ""
    refusal: str = ""
    finish_reason: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    price: float | None = None
    usage: Usage = field(default_factory=Usage)


class Transport(Protocol):
    """Sends one request of OpenAI's chat completions."""

    async def send(self, body: Mapping[str, Any]) -> ChatReply:
        """Send a request.

        Raises:
            ChatFault: If there is no reply.
        """
        ...

    async def close(self) -> None:
        """Close connections."""
        ...


class HTTPTransport:
    """An OpenAI-compatible server at a base URL.

    Args:
        base: The address up to and including /v1, from `parse_api_base`.
        key: Sent as a bearer token; "" sends none.
        connections: Connections kept open.
    """

    def __init__(self, base: httpx.URL, key: str = "", *, connections: int = 16) -> None:
        self.base, self._key, self._connections = base, key, connections
        self._client: httpx.AsyncClient | None = None

    async def send(self, body: Mapping[str, Any]) -> ChatReply:
        """See `Transport.send`."""
        import httpx

        # Escaped JSON: a prompt may hold lone surrogates, which UTF-8 cannot encode.
        content = json.dumps(body).encode()
        try:
            url = self._url("/chat/completions")
            async with self._opened().stream("POST", url, content=content) as response:
                data = await _read(response)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ChatFault(Problem.CONNECTION, f"no connection: {error!r}", was_sent=False) from error
        except httpx.TransportError as error:
            raise ChatFault(Problem.CONNECTION, f"{type(error).__name__}: {error}") from error
        except httpx.DecodingError as error:
            raise ChatFault(Problem.MALFORMED, f"{type(error).__name__}: {error}") from error
        if response.status_code != 200:
            wait = parse_retry_after(response.headers.get("retry-after"))
            raise fault_of(response.status_code, _detail(data), wait)
        return parse_completion(data)

    async def models(self) -> list[dict[str, Any]]:
        """The server's list of models; empty if it does not answer."""
        import httpx

        try:
            async with self._opened().stream("GET", self._url("/models")) as response:
                listed = json.loads(await _read(response))["data"]
            return [m for m in listed if isinstance(m, dict)]
        except (httpx.HTTPError, ChatFault, ValueError, KeyError, TypeError, RecursionError):
            return []

    async def close(self) -> None:
        """See `Transport.close`."""
        if self._client is not None:
            await self._client.aclose()

    def _opened(self) -> httpx.AsyncClient:
        import httpx

        if self._client is None:
            # Uncompressed: a small compressed reply can unpack to gigabytes before its size is seen.
            headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            n = self._connections
            limits = httpx.Limits(max_connections=n, max_keepalive_connections=n)
            # `ChatClient` times the whole request; httpx would time each read.
            self._client = httpx.AsyncClient(headers=headers, limits=limits, timeout=None)
        return self._client

    def _url(self, path: str) -> httpx.URL:
        return self.base.copy_with(path=self.base.path.rstrip("/") + path)


class LiteLLMTransport:
    """A provider's model, through LiteLLM. Its cache, retries and telemetry are off.

    Args:
        key: The provider's key; None leaves it to the provider's own environment variable.

    Raises:
        ConfigError: If LiteLLM is not installed.
    """

    def __init__(self, key: str | None = None) -> None:
        self._litellm = import_litellm()
        # Every request is counted by `ChatClient`, so nothing may be sent again, or answered, behind its back.
        self._options: dict[str, Any] = {"max_retries": 0, "num_retries": 0, "caching": False}
        if key:
            self._options["api_key"] = key

    async def send(self, body: Mapping[str, Any]) -> ChatReply:
        """See `Transport.send`."""
        try:
            result = await self._litellm.acompletion(**body, **self._options)
            choice = _only_choice(result.choices)
            native = getattr(choice, "provider_specific_fields", None) or {}
            fields = getattr(choice.message, "provider_specific_fields", None) or {}
            reply = ChatReply(
                text=choice.message.content,
                reasoning=getattr(choice.message, "reasoning_content", None) or "",
                refusal=fields.get("refusal") or "",
                # LiteLLM maps unknown reasons to "stop" and keeps the provider's own beside it.
                finish_reason=_finish_reason(
                    choice.finish_reason,
                    native.get("native_finish_reason"),
                    calls_tools=bool(
                        getattr(choice.message, "tool_calls", None) or getattr(choice.message, "function_call", None)
                    ),
                ),
                prompt_tokens=result.usage.prompt_tokens,
                completion_tokens=result.usage.completion_tokens,
                price=self._price(result),
            )
        except Exception as error:
            fault = self._fault(error)
            if fault is None:
                raise
            raise fault from error
        return _checked(reply)

    async def close(self) -> None:
        """See `Transport.close`."""

    def _price(self, result: Any) -> float | None:
        try:
            price = float(self._litellm.completion_cost(completion_response=result))
            return price if math.isfinite(price) and price >= 0 else None
        except Exception:  # LiteLLM raises its own and others for a model without a price
            return None

    def _fault(self, error: Exception) -> ChatFault | None:
        """The error as a `ChatFault`; None for an error that is ours."""
        status, kind, text = getattr(error, "status_code", None), type(error).__name__, str(error)
        if isinstance(error, TimeoutError) or kind == "Timeout":
            return ChatFault(Problem.TIMEOUT, text)
        if any(sign in text.lower() for sign in NO_KEY):  # LiteLLM reports a missing key as a server error
            return ChatFault(Problem.NO_KEY, text)
        if kind == "ContextWindowExceededError":
            return ChatFault(Problem.TOO_LONG, text, status=status)
        if kind == "ContentPolicyViolationError":
            return ChatFault(Problem.REFUSAL, text, status=status)
        if (reason := _not_connected(error)) is not None:
            return ChatFault(Problem.CONNECTION, reason, was_sent=False)
        if isinstance(error, self._litellm.exceptions.APIConnectionError):
            return ChatFault(Problem.CONNECTION, text)
        if status is not None and status >= 500 and not _was_refused(error):
            # LiteLLM reports a reply that broke off or cannot be read as a status of its own.
            return ChatFault(Problem.MALFORMED, text, status=status)
        if status is not None:
            headers = getattr(error, "litellm_response_headers", None) or getattr(
                getattr(error, "response", None), "headers", None
            )
            return fault_of(status, text, parse_retry_after(headers.get("retry-after") if headers else None))
        if isinstance(error, LookupError | AttributeError | TypeError | ValueError | OSError):
            return ChatFault(Problem.MALFORMED, f"not a chat completion: {kind}: {text}")
        return None


def import_litellm() -> Any:
    """LiteLLM, told not to touch the network on its own.

    Raises:
        ConfigError: If it is not installed.
    """
    # On import LiteLLM would download its price table and load a .env file.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    try:
        import litellm
    except ImportError as error:
        raise ConfigError(
            f"an LLM judge of a provider needs the extra `judge` ({error}): pip install 'rgsd[judge]', use --judge "
            "checks, or set --judge_api_base"
        ) from error
    module: Any = litellm
    module.suppress_debug_info = True
    module.telemetry = False
    module.cache = None
    return module


def fault_of(status: int, detail: str, retry_after: float | None = None) -> ChatFault:
    """What a reply with this status means."""
    text = detail.lower()
    if status == 402 or any(sign in text for sign in NO_CREDIT):
        problem = Problem.NO_CREDIT
    elif status in (401, 403):
        problem = Problem.DENIED
    elif status == 404:
        problem = Problem.NOT_FOUND
    elif status == 429:
        problem = Problem.RATE_LIMIT
    elif status in TRANSIENT_STATUS or status >= 500:
        problem = Problem.SERVER
    elif status < 400:
        problem = Problem.REDIRECT
    elif status == 413 or any(sign in text for sign in TOO_LONG):
        problem = Problem.TOO_LONG
    elif any(sign in text for sign in REFUSED):
        problem = Problem.REFUSAL
    else:
        problem = Problem.BAD_REQUEST
    return ChatFault(problem, f"status {status} ({one_line(detail)})", status=status, retry_after=retry_after)


def parse_completion(data: bytes) -> ChatReply:
    """A chat completion from its JSON.

    Raises:
        ChatFault: If it is not one.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ChatFault(Problem.MALFORMED, f"a reply that is not JSON: {one_line(_text(data), 80)!r}") from error
    try:
        if "error" in value and not value.get("choices"):
            raise ChatFault(Problem.MALFORMED, f"an error in place of a reply: {json.dumps(value['error'])}")
        choice, usage = _only_choice(value["choices"]), value.get("usage") or {}
        message = choice["message"]
        reply = ChatReply(
            text=message.get("content"),
            reasoning=message.get("reasoning_content") or message.get("reasoning") or "",
            refusal=message.get("refusal") or "",
            finish_reason=_finish_reason(
                choice.get("finish_reason"),
                calls_tools=bool(message.get("tool_calls") or message.get("function_call")),
            ),
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ChatFault(Problem.MALFORMED, f"not a chat completion ({error!r}): {one_line(str(value))}") from error
    return _checked(reply)


def _checked(reply: ChatReply) -> ChatReply:
    """The reply without credentials.

    Raises:
        ChatFault: If a field has the wrong type, or the reply is too large.
    """
    texts = (reply.text or "", reply.reasoning, reply.refusal)
    counts = (reply.prompt_tokens, reply.completion_tokens)
    if not all(isinstance(t, str) for t in texts) or not all(n is None or type(n) is int for n in counts):
        raise ChatFault(Problem.MALFORMED, f"not a chat completion: {one_line(str(reply))}")
    if sum(map(len, texts)) > MAX_REPLY_BYTES:
        raise _too_large()
    return ChatReply(
        text=None if reply.text is None else redact_known(reply.text),
        reasoning=redact_known(reply.reasoning),
        refusal=redact_known(reply.refusal),
        finish_reason=reply.finish_reason,
        prompt_tokens=_plausible(reply.prompt_tokens),
        completion_tokens=_plausible(reply.completion_tokens),
        price=reply.price,
    )


def _plausible(count: int | None) -> int | None:
    """A count of tokens, or None where it cannot be true: a negative one would pay money back into the budget."""
    return count if count is not None and 0 <= count <= MAX_TOKENS else None


def _only_choice(choices: Any) -> Any:
    """The choice of a reply. One was asked for; of two, nobody can say which is the answer."""
    if len(choices) != 1:
        raise ValueError(f"{len(choices)} choices, expected 1")
    return choices[0]


def _finish_reason(reason: Any, native: Any = None, *, calls_tools: bool = False) -> str | None:
    """Why a reply ended: "stop" where the model ended it as its answer."""
    if native is not None and reason == "stop":
        reason = native
    if reason is None:
        return None
    if reason in NATIVE_STOPS or reason == "stop":
        return "tool_calls" if calls_tools else "stop"
    return redact_known(str(reason))[:40]


async def _read(response: httpx.Response) -> bytes:
    """The body.

    Raises:
        ChatFault: If it exceeds `MAX_REPLY_BYTES`. The rest is not read.
    """
    parts, n = [], 0
    async for part in response.aiter_bytes():
        n += len(part)
        if n > MAX_REPLY_BYTES:
            raise _too_large()
        parts.append(part)
    return b"".join(parts)


def _too_large() -> ChatFault:
    return ChatFault(Problem.REPLY_TOO_LARGE, f"a reply of more than {MAX_REPLY_BYTES / 2**20:g} MiB")


def _detail(data: bytes) -> str:
    """What a server says about a refusal."""
    text = _text(data)
    try:
        value = json.loads(text)
        error = value.get("error", value.get("detail", value))
        text = error if isinstance(error, str) else json.dumps(error, ensure_ascii=False)
        if isinstance(error, dict) and error.get("message"):
            code = error.get("code") or error.get("type")
            text = f"{error['message']}" + (f" [{code}]" if code else "")
    except (ValueError, AttributeError, RecursionError):
        pass
    return text.strip() or "no reason given"


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def one_line(text: str, most: int = 300) -> str:
    """Text from a server for a message: one line, without credentials, then shortened. Half a key would not be
    recognized."""
    text = " ".join(redact(text).split())
    return text if len(text) <= most else text[:most] + " ..."


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    for _ in range(10):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__ or cause.__context__


def _not_connected(error: BaseException) -> str | None:
    """Why there was no connection, if that is what caused an error: LiteLLM calls it a server error."""
    import httpx

    for cause in _causes(error):
        if isinstance(cause, httpx.ConnectError | httpx.ConnectTimeout | ConnectionRefusedError):
            return f"no connection: {cause!r}"
    return None


def _was_refused(error: BaseException) -> bool:
    """Whether a server's own status caused an error. LiteLLM's exceptions carry one that may be made up."""
    return any(
        getattr(cause, "response", None) is not None and not type(cause).__module__.startswith("litellm")
        for cause in _causes(error)
    )


def parse_retry_after(value: str | None) -> float | None:
    """Seconds that a `Retry-After` header asks for, given as a number or a date. None if it is neither."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def parse_api_base(api_base: str, setting: str = "api_base") -> httpx.URL:
    """The address of a server.

    Raises:
        ConfigError: If it is not an http or https address.
    """
    import httpx

    example = "e.g. http://localhost:8000/v1"
    try:
        url = httpx.URL(api_base)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError(f"{setting} must be an address, {example}, got one that cannot be read ({error})") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"{setting} must begin with http:// or https:// and name a host, {example}")
    path = url.path.rstrip("/").removesuffix("/chat/completions")
    return url.copy_with(path=path or "/")


def read_key(variable: str, *, is_required: bool = False) -> str:
    """The key in an environment variable; "" if it is not set.

    Raises:
        ConfigError: If it is required and missing, or cannot be sent in a header. The message does not contain it.
    """
    key = os.environ.get(variable, "").strip()
    if not key and is_required:
        raise ConfigError(
            f"api_key_env names {variable}, which is not set: set it to the server's key, or leave it out"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"the value of {variable} is not a key: it holds spaces, line breaks or non-ASCII letters")
    return key
