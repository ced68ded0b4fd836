"""How a chat request reaches a model: over HTTP to an OpenAI-compatible server, or through LiteLLM to a provider.

A transport sends one request and returns its reply or raises a `ChatFault`. It never retries: `ChatClient` does.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from rgsd.errors import ConfigError
from rgsd.inference.replies import (
    MAX_REPLY_BYTES,
    ChatFault,
    ChatReply,
    Problem,
    checked,
    error_detail,
    fault_of,
    finish_reason_of,
    only_choice,
    parse_completion,
    parse_retry_after,
    too_large,
)

if TYPE_CHECKING:
    import httpx

NO_KEY = ("api_key client option must be set", "missing credentials", "missing anthropic api key", "api key not found")


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

        # json.dumps escapes non-ASCII text. A prompt may hold lone surrogates, which UTF-8 cannot encode.
        content = json.dumps(body).encode()
        try:
            url = self._url("/chat/completions")
            async with self._connected().stream("POST", url, content=content) as response:
                data = await _read(response)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise ChatFault(Problem.CONNECTION, f"no connection: {error!r}", was_sent=False) from error
        except httpx.TransportError as error:
            raise ChatFault(Problem.CONNECTION, f"{type(error).__name__}: {error}") from error
        except httpx.DecodingError as error:
            raise ChatFault(Problem.MALFORMED, f"{type(error).__name__}: {error}") from error
        if response.status_code != 200:
            wait = parse_retry_after(response.headers.get("retry-after"))
            raise fault_of(response.status_code, error_detail(data), wait)
        return parse_completion(data)

    async def models(self) -> list[dict[str, Any]]:
        """The server's list of models; empty if it does not answer."""
        import httpx

        try:
            async with self._connected().stream("GET", self._url("/models")) as response:
                listed = json.loads(await _read(response))["data"]
            return [m for m in listed if isinstance(m, dict)]
        except (httpx.HTTPError, ChatFault, ValueError, KeyError, TypeError, RecursionError):
            return []

    async def close(self) -> None:
        """See `Transport.close`."""
        if self._client is not None:
            await self._client.aclose()

    def _connected(self) -> httpx.AsyncClient:
        import httpx

        if self._client is None:
            # No compression: a small reply could unpack to gigabytes before its size is checked.
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
        # `ChatClient` counts every request, so LiteLLM must neither send one again nor answer one from a cache.
        self._options: dict[str, Any] = {"max_retries": 0, "num_retries": 0, "caching": False}
        if key:
            self._options["api_key"] = key

    async def send(self, body: Mapping[str, Any]) -> ChatReply:
        """See `Transport.send`."""
        try:
            # LiteLLM validates replies only loosely, so reading one may raise too: it stays inside the try.
            result = await self._litellm.acompletion(**body, **self._options)
            choice = only_choice(result.choices)
            native = getattr(choice, "provider_specific_fields", None) or {}
            fields = getattr(choice.message, "provider_specific_fields", None) or {}
            reply = ChatReply(
                text=choice.message.content,
                reasoning=getattr(choice.message, "reasoning_content", None) or "",
                refusal=fields.get("refusal") or "",
                finish_reason=finish_reason_of(
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
        return checked(reply)

    async def close(self) -> None:
        """See `Transport.close`."""

    def _price(self, result: Any) -> float | None:
        try:
            price = float(self._litellm.completion_cost(completion_response=result))
            return price if math.isfinite(price) and price >= 0 else None
        except Exception:  # LiteLLM raises its own and others for a model without a price
            return None

    def _fault(self, error: Exception) -> ChatFault | None:
        """The error as a `ChatFault`, or None for an error that is not about the request."""
        status, kind, text = getattr(error, "status_code", None), type(error).__name__, str(error)
        if isinstance(error, TimeoutError) or kind == "Timeout":
            return ChatFault(Problem.TIMEOUT, text)
        if any(sign in text.lower() for sign in NO_KEY):  # LiteLLM reports a missing key as a server error
            return ChatFault(Problem.NO_KEY, text)
        if kind == "ContextWindowExceededError":
            return ChatFault(Problem.TOO_LONG, text, status=status)
        if kind == "ContentPolicyViolationError":
            return ChatFault(Problem.REFUSAL, text, status=status)
        # Before APIConnectionError, which LiteLLM also raises when a connection broke after the request was sent.
        if (reason := _not_connected(error)) is not None:
            return ChatFault(Problem.CONNECTION, reason, was_sent=False)
        if isinstance(error, self._litellm.exceptions.APIConnectionError):
            return ChatFault(Problem.CONNECTION, text)
        if status is not None and status >= 500 and not _was_refused(error):
            # The provider sent no such status: LiteLLM reports a broken or unreadable reply as a server error.
            return ChatFault(Problem.MALFORMED, text, status=status)
        if status is not None:
            # LiteLLM keeps the headers in different places, depending on the provider.
            headers = getattr(error, "litellm_response_headers", None) or getattr(
                getattr(error, "response", None), "headers", None
            )
            return fault_of(status, text, parse_retry_after(headers.get("retry-after") if headers else None))
        if isinstance(error, LookupError | AttributeError | TypeError | ValueError | OSError):
            return ChatFault(Problem.MALFORMED, f"not a chat completion: {kind}: {text}")
        return None


def import_litellm() -> Any:
    """LiteLLM, configured not to use the network on its own.

    Raises:
        ConfigError: If it is not installed.
    """
    # On import LiteLLM would download its price table and load a .env file.
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")
    try:
        import litellm
    except ImportError as error:
        raise ConfigError(
            f"a judge from a provider needs the extra `judge` ({error}): pip install 'rgsd[judge]', or use --judge "
            "checks, or a server of your own with --judge_api_base"
        ) from error
    module: Any = litellm
    module.suppress_debug_info = True
    module.telemetry = False
    module.cache = None
    return module


async def _read(response: httpx.Response) -> bytes:
    """The body of a response.

    Raises:
        ChatFault: If it exceeds `MAX_REPLY_BYTES`. The rest is not read.
    """
    parts, n = [], 0
    async for part in response.aiter_bytes():
        n += len(part)
        if n > MAX_REPLY_BYTES:
            raise too_large()
        parts.append(part)
    return b"".join(parts)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and the errors behind it, at most ten."""
    cause: BaseException | None = error
    # Chains of causes can contain cycles.
    for _ in range(10):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__ or cause.__context__


def _not_connected(error: BaseException) -> str | None:
    """Why there was no connection, if that caused the error. LiteLLM reports it as a server error."""
    import httpx

    for cause in _causes(error):
        if isinstance(cause, httpx.ConnectError | httpx.ConnectTimeout | ConnectionRefusedError):
            return f"no connection: {cause!r}"
    return None


def _was_refused(error: BaseException) -> bool:
    """Whether a server's own status caused the error. The status of LiteLLM's exceptions may be made up."""
    return any(
        getattr(cause, "response", None) is not None and not type(cause).__module__.startswith("litellm")
        for cause in _causes(error)
    )


def parse_api_base(api_base: str, setting: str = "api_base") -> httpx.URL:
    """Read the address of a server.

    Args:
        api_base: The address, with or without /chat/completions.
        setting: The setting that holds it, for the error.

    Raises:
        ConfigError: If it is not an http or https address.
    """
    import httpx

    example = "e.g. http://localhost:8000/v1"
    try:
        url = httpx.URL(api_base)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigError(f"{setting} must be an address, {example}, but it cannot be parsed ({error})") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigError(f"{setting} must start with http:// or https:// and contain a host, {example}")
    path = url.path.rstrip("/").removesuffix("/chat/completions")
    return url.copy_with(path=path or "/")


def read_key(variable: str, *, is_required: bool = False) -> str:
    """Read a key from an environment variable.

    Returns:
        The key, or "" if the variable is not set.

    Raises:
        ConfigError: If it is required and missing, or cannot be sent in a header. The message never contains the key.
    """
    key = os.environ.get(variable, "").strip()
    if not key and is_required:
        raise ConfigError(
            f"api_key_env is {variable}, which is not set: set it to the server's key, or remove api_key_env"
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            f"the value of {variable} is not a key: it contains spaces, line breaks or non-ASCII characters"
        )
    return key
