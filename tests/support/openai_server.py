"""A real OpenAI-compatible HTTP server on loopback that misbehaves on command. For tests; nothing leaves the machine.

    from support.openai_server import openai_server_fixture  # noqa: F401: brings the fixture `openai_server`

    def test_it(openai_server):
        server = openai_server(lambda request: "yes", script=["503", "cut", None])
        ...                                      # send requests to server.url + "/chat/completions"
        assert server.faults() == ["503", "cut", None]

or, without the fixture, `with OpenAIServer(lambda request: "yes") as server: ...`.

What a good answer says is the test's choice: `answer(request)` gets the request's JSON and returns a text or a `Reply`.
It is called in the server's thread; an error in it is sent as a 500 and raised again when the server is closed.

Which requests go wrong:
  script      a sequence of faults in the order of arrival, None being none; or a function (position, request) -> fault.
  fault_rate  after the script: the share of requests that go wrong, each fault of `faults` being as likely. The draw
              depends on `seed`, the request's body and how often this body came, not on the order of arrival, so that a
              test with concurrency is the same each time. `most_in_a_row` bounds the faults in a row for one body.

A fault is a name, or `Fault(name, retry_after=..., delay=...)`:
  429 503            refused, with `Retry-After` (fault's, else server's `retry_after`; None sends no such header)
  500 401 403 404 400 422    refused. 400 can carry another message: Fault("400", text="...")
  quota              429 that no waiting cures: the code is insufficient_quota
  redirect           307 to elsewhere
  slow               a good answer after `delay` seconds
  hang               never an answer, until the client gives up or the server is closed
  drop               the connection closed without one byte
  cut                right headers and half of the body, then the connection is reset
  wrong_length       a Content-Length that promises more than is sent before the connection is closed
  short_length       a Content-Length that promises half of what is sent
  half_json          a whole HTTP reply whose body is half of the JSON
  html               a whole 200 reply that is a proxy's HTML page
  error_in_200       a whole 200 reply with {"error": ...} in it
  empty_choices      a chat completion with no choice in it
  no_usage           a good answer without token counts
  empty_content      a chat completion whose content is ""
  length             the answer cut in half, with finish_reason "length"
  refusal            content null, and the field `refusal`
  prose              the answer with prose around it
  short_verdicts     the answer is JSON: its first list, one item short; {} where it has no list
  long_verdicts      likewise, its last item once more (with its number raised by one, if it has one); where it has no
                     list, a list of it twice
  bad_json           the answer with its last bracket taken off and a comma in its place
`TRANSPORT_FAULTS` (slow among them) are those that patience or another try cures, and none of their wrong replies can
be taken for an answer; `CONTENT_FAULTS` are whole chat completions whose content is not the answer (a generator takes
them for what the model said); `FATAL_FAULTS` are those that no other try cures.

What can be asked of it afterwards: `requests` (a `Record` each), `faults()`, `max_concurrency`, `good_replies()` and
`whole_replies()` (how often each body got a whole 200 reply: a test of "nothing bought twice"), `bought_twice()`.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

TRANSPORT_FAULTS = (
    "429", "500", "503", "slow", "drop", "cut", "wrong_length", "short_length", "half_json", "html", "error_in_200",
    "empty_choices",
)  # fmt: skip
CONTENT_FAULTS = ("empty_content", "length", "refusal", "prose", "short_verdicts", "long_verdicts", "bad_json")
FATAL_FAULTS = ("401", "403", "404", "400", "422", "quota", "redirect")
ALL_FAULTS = (*TRANSPORT_FAULTS, *CONTENT_FAULTS, *FATAL_FAULTS, "hang", "no_usage")

_REASONS = {
    200: "OK", 307: "Temporary Redirect", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 422: "Unprocessable Entity", 429: "Too Many Requests", 500: "Internal Server Error",
    503: "Service Unavailable",
}  # fmt: skip
_MESSAGES = {
    "400": "Invalid request.",
    "401": "Incorrect API key provided.",
    "403": "You have no access to this model.",
    "404": "The model does not exist.",
    "422": "Unexpected fields in the request.",
    "429": "Rate limit reached.",
    "500": "The server had an error.",
    "503": "The server is overloaded.",
    "quota": "You exceeded your current quota, please check your plan and billing details.",
}
_NOT_WHOLE = frozenset(
    {"hang", "drop", "cut", "wrong_length", "short_length", "half_json", "html", "error_in_200", "empty_choices"}
)


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of one request.

    Args:
        kind: one of `ALL_FAULTS`.
        retry_after: seconds or a date for the header `Retry-After`; None: the server's own.
        delay: seconds before anything is sent; None: the server's `slow_delay` for "slow", else none.
        text: the error's message, instead of the usual one.
    """

    kind: str
    retry_after: float | str | None = None
    delay: float | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ALL_FAULTS:
            raise ValueError(f"there is no fault {self.kind!r}, known: {', '.join(ALL_FAULTS)}")


@dataclass(frozen=True, slots=True)
class Reply:
    """A good answer that is more than text.

    Args:
        content: the text; None is sent as null.
        reasoning_content: what a server with a reasoning parser splits off.
        reasoning_field: its name: `reasoning_content`, or `reasoning` as newer vLLM and OpenRouter have it.
        refusal: the field of that name.
        finish_reason: stop, length, content_filter, ...; None is sent as null.
        completion_tokens: of the usage; None: the number of words.
        prompt_tokens: of the usage; None: the number of words.
        message: more fields of the message; they win.
        n_choices: how often the choice stands in the reply.
    """

    content: str | None
    reasoning_content: str | None = None
    reasoning_field: str = "reasoning_content"
    refusal: str | None = None
    finish_reason: str | None = "stop"
    completion_tokens: int | None = None
    prompt_tokens: int | None = None
    message: Mapping[str, Any] = field(default_factory=dict)
    n_choices: int = 1


@dataclass(slots=True)
class Record:
    """One request to /chat/completions and its outcome.

    Args:
        position: of its arrival, from 0.
        body: its JSON; the raw text when it was none.
        headers: names in lower case.
        at: `time.monotonic()` of its arrival.
        key: a digest of the body: the same for the same request.
        fault: what went wrong, or None.
        status: what was sent; None: nothing was.
        is_whole: a whole 200 chat completion was sent, whatever its content.
        is_good: it was the answer itself.
        ended: `time.monotonic()` of its end; None: it hangs.
    """

    position: int
    body: Any
    headers: dict[str, str]
    at: float
    key: str
    fault: str | None = None
    status: int | None = None
    is_whole: bool = False
    is_good: bool = False
    ended: float | None = None


Answer = Callable[[dict[str, Any]], "str | Reply"]
Script = Sequence["str | Fault | None"] | Callable[[int, dict[str, Any]], "str | Fault | None"]


@dataclass
class OpenAIServer:
    """The server; see the module docstring.

    Args:
        answer: the content of a good answer to a request.
        script, fault_rate, faults, seed, most_in_a_row: which requests go wrong.
        retry_after: of 429 and 503; None sends no such header.
        slow_delay: seconds of "slow".
        latency: seconds before every answer, so that requests overlap.
        models: what GET /models lists.
        owned_by: their owner; "vllm" where a client should take this for vLLM's server.
        api_key: when set, a request without it is refused with 401.
    """

    answer: Answer
    script: Script = ()
    fault_rate: float = 0.0
    faults_drawn: Sequence[str | Fault] = TRANSPORT_FAULTS
    seed: int = 0
    most_in_a_row: int | None = None
    retry_after: float | str | None = 0.02
    slow_delay: float = 0.05
    latency: float = 0.0
    models: Sequence[str] = ("test-model",)
    owned_by: str = "test"
    api_key: str | None = None
    requests: list[Record] = field(default_factory=list, init=False)
    other_paths: list[str] = field(default_factory=list, init=False)
    max_concurrency: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._in_flight = 0
        self._seen: Counter[str] = Counter()
        self._in_a_row: Counter[str] = Counter()
        self._errors: list[Exception] = []
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._port = 0
        self._thread = threading.Thread(target=self._loop.run_forever, name="openai-server", daemon=True)

    # For the test.

    @property
    def url(self) -> str:
        """The base URL for clients; ends in /v1."""
        return f"http://127.0.0.1:{self._port}/v1"

    def start(self) -> OpenAIServer:
        """Listen on a free port of 127.0.0.1."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def close(self) -> None:
        """Stop at once and reset hanging connections. Raises the first error of `answer`, if any."""
        if not self._thread.is_alive():
            return
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        if self._errors:
            raise self._errors[0]

    def __enter__(self) -> OpenAIServer:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def records(self) -> list[Record]:
        """The requests so far, in order of arrival; safe to call while more arrive."""
        with self._lock:
            return list(self.requests)

    def faults(self) -> list[str | None]:
        """The fault of each request, in order of arrival."""
        return [r.fault for r in self.records()]

    def good_replies(self) -> Counter[str]:
        """Per body: how often the complete answer was sent."""
        return Counter(r.key for r in self.records() if r.is_good)

    def whole_replies(self) -> Counter[str]:
        """Per body: how often a complete 200 chat completion was sent, with any content."""
        return Counter(r.key for r in self.records() if r.is_whole)

    def bought_twice(self) -> list[Any]:
        """The bodies of requests that were repeated after a good reply."""
        bodies = {r.key: r.body for r in self.records()}
        return [bodies[key] for key, n in self.good_replies().items() if n > 1]

    # In the server's thread: connections.

    async def _listen(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=2**24, backlog=1024)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while await self._one(reader, writer):
                pass
            writer.close()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            writer.transport.abort()
        finally:
            self._tasks.discard(task)

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Read and answer one request; returns whether to keep the connection."""
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        method, target, _ = lines[0].split(" ", 2)
        headers = {k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)}
        raw = await _body(reader, headers)
        keep = headers.get("connection", "").lower() != "close"
        path = target.partition("?")[0]
        if method == "POST" and path == "/v1/chat/completions":
            return await self._chat(raw, headers, reader, writer) and keep
        with self._lock:
            self.other_paths.append(f"{method} {path}")
        if method == "GET" and path == "/v1/models":
            listed = [{"id": m, "object": "model", "owned_by": self.owned_by} for m in self.models]
            await _send(writer, 200, {"object": "list", "data": listed})
        else:
            await _send(writer, 404, {"error": {"message": f"there is no {method} {path}"}})
        return keep

    async def _chat(
        self, raw: bytes, headers: dict[str, str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        try:
            body = json.loads(raw)
        except ValueError:
            body = raw.decode("utf-8", "replace")
        key = _key(body)
        with self._lock:
            record = Record(len(self.requests), body, headers, time.monotonic(), key)
            self.requests.append(record)
            self._in_flight += 1
            self.max_concurrency = max(self.max_concurrency, self._in_flight)
            fault = self._fault(record)
        record.fault = fault.kind if fault else None
        try:
            return await self._replied(record, fault, reader, writer)
        finally:
            with self._lock:
                self._in_flight -= 1
                record.ended = time.monotonic()

    def _fault(self, record: Record) -> Fault | None:
        """The fault of this request."""
        seen = self._seen[record.key]
        self._seen[record.key] += 1
        chosen: str | Fault | None = None
        if callable(self.script):
            chosen = self.script(record.position, record.body)
        elif record.position < len(self.script):
            chosen = self.script[record.position]
        else:
            draw = random.Random(f"{self.seed} {record.key} {seen}")
            most = self.most_in_a_row
            is_due = draw.random() < self.fault_rate and (most is None or self._in_a_row[record.key] < most)
            chosen = draw.choice(list(self.faults_drawn)) if is_due else None
            self._in_a_row[record.key] = self._in_a_row[record.key] + 1 if is_due else 0
        return Fault(chosen) if isinstance(chosen, str) else chosen

    # In the server's thread: replies.

    async def _replied(
        self, record: Record, fault: Fault | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answer or not; returns whether to keep the connection."""
        kind = fault.kind if fault else ""
        if self.api_key is not None and record.headers.get("authorization") != f"Bearer {self.api_key}":
            got = record.headers.get("authorization", "no key")
            record.status = 401
            await _send(writer, 401, {"error": {"message": f"Incorrect API key provided: {got}"}})
            return True
        if kind == "hang":
            await reader.read(1)  # returns when the client is gone; closing the server cancels it
            return False
        delay = self.latency + ((fault.delay or 0.0) if fault else 0.0)
        if fault and kind == "slow" and fault.delay is None:
            delay += self.slow_delay
        if delay:
            await asyncio.sleep(delay)
        if reader.at_eof() or writer.is_closing():
            return False
        if kind == "drop":
            return False
        if fault and (kind.isdigit() or kind in ("quota", "redirect")):
            record.status = await self._refuse(fault, writer)
            return True
        try:
            payload = self._payload(record, kind)
        except Exception as error:
            self._errors.append(error)
            record.status = 500
            await _send(writer, 500, {"error": {"message": f"the test's answer failed: {error!r}"}})
            return True
        record.status = 200
        data = json.dumps(payload).encode()
        if kind == "cut":
            writer.write(_head(200, len(data)) + data[: len(data) // 2])
            await writer.drain()
            await asyncio.sleep(0.001)  # let the half leave before the reset
            writer.transport.abort()
            return False
        if kind == "wrong_length":
            writer.write(_head(200, len(data) + 100) + data)
            await writer.drain()
            return False
        if kind == "short_length":
            writer.write(_head(200, len(data) // 2) + data)
            await writer.drain()
            return False
        if kind == "half_json":
            data = data[: len(data) // 2]
        if kind == "html":
            data = b"<html><body>502 Bad Gateway</body></html>"
        writer.write(_head(200, len(data)) + data)
        await writer.drain()
        record.is_whole = kind not in _NOT_WHOLE
        record.is_good = kind in ("", "slow")
        return True

    async def _refuse(self, fault: Fault, writer: asyncio.StreamWriter) -> int:
        kind = fault.kind
        extra: dict[str, str] = {}
        status = {"quota": 429, "redirect": 307}.get(kind) or int(kind)
        if kind in ("429", "503"):
            wait = self.retry_after if fault.retry_after is None else fault.retry_after
            extra = {} if wait is None else {"Retry-After": str(wait)}
        if kind == "redirect":
            extra = {"Location": "http://127.0.0.1:9/elsewhere"}
        error = {"message": fault.text or _MESSAGES.get(kind, ""), "type": "error", "code": kind}
        if kind == "quota":
            error |= {"code": "insufficient_quota", "type": "insufficient_quota"}
        await _send(writer, status, {"error": error}, extra)
        return status

    def _payload(self, record: Record, kind: str) -> dict[str, Any]:
        """The chat completion, with the fault in its content if there is one."""
        given = self.answer(record.body)
        reply = given if isinstance(given, Reply) else Reply(given)
        content, finish_reason, refusal = reply.content, reply.finish_reason, reply.refusal
        text = content or ""
        if kind == "empty_content":
            content = ""
        elif kind == "length":
            content, finish_reason = text[: len(text) // 2], "length"
        elif kind == "refusal":
            content, refusal = None, "I can't help with that."
        elif kind == "prose":
            content = f"Sure, here it is:\n\n{text}\n\nI hope that this helps!"
        elif kind in ("short_verdicts", "long_verdicts"):
            content = _miscounted(text, longer=kind == "long_verdicts")
        elif kind == "bad_json":
            content = text.rstrip()[:-1] + ","
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reply.reasoning_content is not None:
            message[reply.reasoning_field] = reply.reasoning_content
        if refusal is not None:
            message["refusal"] = refusal
        message |= reply.message
        n = len(text.split()) if reply.completion_tokens is None else reply.completion_tokens
        n_prompt = len(json.dumps(record.body).split()) if reply.prompt_tokens is None else reply.prompt_tokens
        payload: dict[str, Any] = {
            "id": f"chatcmpl-{record.position}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": record.body.get("model", "") if isinstance(record.body, dict) else "",
            "choices": [
                {"index": i, "message": message, "finish_reason": finish_reason, "logprobs": None}
                for i in range(reply.n_choices)
            ],
            "usage": {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n},
        }
        if kind == "error_in_200":
            return {"error": {"message": "upstream failed", "code": 502}}
        if kind == "empty_choices":
            payload["choices"] = []
        if kind == "no_usage":
            del payload["usage"]
        return payload


def _key(body: Any) -> str:
    """A digest of the body without the random code that rgsd draws for each judge request."""
    text = json.dumps(body, sort_keys=True)
    if code := re.search(r"\[end of (?:response|claims) ([0-9a-f]{8})\]", text):
        text = text.replace(code[1], "")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def asked_ids(request: dict[str, Any]) -> list[str]:
    """The ids of the criteria (or claims) in a judge request, in order."""
    user = request["messages"][1]["content"]
    return re.findall(r"^(?:Criterion )?([0-9a-f]{8}-\d+)[.:] ", user, re.MULTILINE)


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
    if headers.get("transfer-encoding", "").lower() != "chunked":
        return await reader.readexactly(int(headers.get("content-length", 0)))
    pieces = []
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        pieces.append(await reader.readexactly(size))
        await reader.readexactly(2)
    await reader.readuntil(b"\r\n")
    return b"".join(pieces)


def _head(status: int, length: int, extra: dict[str, str] | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}", "Content-Type: application/json", f"Content-Length: {length}"]
    lines += [f"{name}: {value}" for name, value in (extra or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def _send(
    writer: asyncio.StreamWriter, status: int, payload: dict[str, Any], extra: dict[str, str] | None = None
) -> None:
    data = json.dumps(payload).encode()
    writer.write(_head(status, len(data), extra) + data)
    await writer.drain()


def _miscounted(text: str, *, longer: bool) -> str:
    """The JSON text with its first list one item longer or shorter."""
    value = json.loads(text)
    items = value if isinstance(value, list) else next((v for v in value.values() if isinstance(v, list)), None)
    if items is None:  # one bare verdict
        return json.dumps([value, value] if longer else {})
    if not longer:
        items.pop()
        return json.dumps(value)
    last = copy.deepcopy(items[-1])
    if isinstance(last, dict):
        for name, number in last.items():
            if isinstance(number, int) and not isinstance(number, bool):
                last[name] = number + 1
                break
    items.append(last)
    return json.dumps(value)


@pytest.fixture(name="openai_server")
def openai_server_fixture() -> Iterator[Callable[..., OpenAIServer]]:
    """A function that starts an `OpenAIServer` with its arguments; all are closed after the test."""
    started: list[OpenAIServer] = []

    def start(answer: Answer = lambda request: "a good answer", **options: Any) -> OpenAIServer:
        started.append(OpenAIServer(answer, **options).start())
        return started[-1]

    yield start
    for server in started:
        server.close()
