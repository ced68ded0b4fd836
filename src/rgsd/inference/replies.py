"""Replies to chat requests, and the faults in place of them: what they mean, and what is read of them.

Everything here comes from outside: it is limited in size, checked for its types, and freed of known credentials.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from enum import StrEnum
from typing import Any

from rgsd.inference.accounting import Usage
from rgsd.redaction import redact, redact_known

MAX_REPLY_BYTES = 8 * 2**20
"""The largest reply that is read, in bytes. A response of 128k tokens has less than 1 MiB."""
MAX_TOKENS = 10**9
"""The most tokens that a server can plausibly claim to have read or written."""
TRANSIENT_STATUS = frozenset({408, 409, 425, 429})
"""HTTP statuses below 500 after which another try may succeed."""
NATIVE_STOPS = frozenset({"end_turn", "stop_sequence", "eos", "eos_token", "COMPLETE", "STOP", "completed"})
"""Names of some servers for the finish reason `stop`."""
# Substrings of error messages, since servers and libraries agree on no error codes:
NO_CREDIT = ("insufficient_quota", "exceeded your current quota")
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
"""Problems after which another try may succeed."""
FINAL = frozenset(
    {Problem.NO_KEY, Problem.DENIED, Problem.NOT_FOUND, Problem.NO_CREDIT, Problem.REDIRECT, Problem.WAIT_TOO_LONG}
)
"""Problems that every further request would have too."""
MAYBE_BILLED = frozenset(
    {Problem.TIMEOUT, Problem.CONNECTION, Problem.MALFORMED, Problem.UNFINISHED, Problem.REPLY_TOO_LARGE}
)
"""Problems in spite of which the model may have answered, so that the provider may charge."""


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


def fault_of(status: int, detail: str, retry_after: float | None = None) -> ChatFault:
    """The fault behind an HTTP status other than 200.

    Args:
        status: The HTTP status.
        detail: What the server said.
        retry_after: Seconds that it asks to wait.
    """
    text = detail.lower()
    # By text first: providers report an empty account as 429 or 403.
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
    """Read a chat completion from its JSON.

    Raises:
        ChatFault: If it is not one.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ChatFault(Problem.MALFORMED, f"a reply that is not JSON: {one_line(_decoded(data), 80)!r}") from error
    try:
        # Some servers report errors with status 200.
        if "error" in value and not value.get("choices"):
            raise ChatFault(Problem.MALFORMED, f"an error in place of a reply: {json.dumps(value['error'])}")
        choice, usage = only_choice(value["choices"]), value.get("usage") or {}
        message = choice["message"]
        reply = ChatReply(
            text=message.get("content"),
            reasoning=message.get("reasoning_content") or message.get("reasoning") or "",
            refusal=message.get("refusal") or "",
            finish_reason=finish_reason_of(
                choice.get("finish_reason"),
                calls_tools=bool(message.get("tool_calls") or message.get("function_call")),
            ),
            prompt_tokens=usage.get("prompt_tokens"),
            completion_tokens=usage.get("completion_tokens"),
        )
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ChatFault(Problem.MALFORMED, f"not a chat completion ({error!r}): {one_line(str(value))}") from error
    return checked(reply)


def checked(reply: ChatReply) -> ChatReply:
    """The reply without known credentials, after a check of its types and size.

    Raises:
        ChatFault: If a field has the wrong type, or the reply is too large.
    """
    texts = (reply.text or "", reply.reasoning, reply.refusal)
    counts = (reply.prompt_tokens, reply.completion_tokens)
    if not all(isinstance(t, str) for t in texts) or not all(n is None or type(n) is int for n in counts):
        raise ChatFault(Problem.MALFORMED, f"not a chat completion: {one_line(str(reply))}")
    # LiteLLM reads replies itself, without a limit.
    if sum(map(len, texts)) > MAX_REPLY_BYTES:
        raise too_large()
    return ChatReply(
        text=None if reply.text is None else redact_known(reply.text),
        reasoning=redact_known(reply.reasoning),
        refusal=redact_known(reply.refusal),
        finish_reason=reply.finish_reason,
        prompt_tokens=_plausible(reply.prompt_tokens),
        completion_tokens=_plausible(reply.completion_tokens),
        price=reply.price,
    )


def finish_reason_of(reason: Any, native: Any = None, *, calls_tools: bool = False) -> str | None:
    """The finish reason in OpenAI's terms: "stop" only if the model ended the reply as its answer.

    Args:
        reason: What the server or LiteLLM reports.
        native: The provider's own reason. LiteLLM reports unknown ones as "stop", and keeps them here.
        calls_tools: Whether the reply calls tools, which some servers report as "stop" too.
    """
    if native is not None and reason == "stop":
        reason = native
    if reason is None:
        return None
    if reason in NATIVE_STOPS or reason == "stop":
        return "tool_calls" if calls_tools else "stop"
    return redact_known(str(reason))[:40]


def only_choice(choices: Any) -> Any:
    """The single choice of a reply. One was requested, and of two it is unclear which is the answer.

    Raises:
        ValueError: If there is not exactly one.
    """
    if len(choices) != 1:
        raise ValueError(f"expected 1 choice, got {len(choices)}")
    return choices[0]


def _plausible(count: int | None) -> int | None:
    """A count of tokens, or None if it cannot be true. A negative one would pay money back into the budget."""
    return count if count is not None and 0 <= count <= MAX_TOKENS else None


def too_large() -> ChatFault:
    """The fault for a reply above `MAX_REPLY_BYTES`."""
    return ChatFault(Problem.REPLY_TOO_LARGE, f"a reply of more than {MAX_REPLY_BYTES / 2**20:g} MiB")


def error_detail(data: bytes) -> str:
    """The reason in the body of an error, in any of the forms that servers use."""
    text = _decoded(data)
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


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def one_line(text: str, most: int = 300) -> str:
    """Text from a server as one line for a message, without credentials, and shortened.

    Credentials go first: half a key would not be recognized.
    """
    text = " ".join(redact(text).split())
    return text if len(text) <= most else text[:most] + " ..."


def parse_retry_after(value: str | None) -> float | None:
    """The seconds in a `Retry-After` header, which is a number or a date. None if it is neither."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        # A date in the past means "now".
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None
