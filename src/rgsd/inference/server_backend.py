"""Generation through an OpenAI-compatible server, with an explanation for each kind of refusal."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rgsd.errors import ConfigError, ModelError, PromptTooLong, RGSDError
from rgsd.inference.chat import ChatClient, RetryPolicy
from rgsd.inference.interface import Conversation, Done, Response, ResponseKey, described, prompt_seed, response_keys
from rgsd.inference.replies import ChatFault, ChatReply, Problem
from rgsd.inference.sampling import SamplingConfig
from rgsd.inference.transports import HTTPTransport, parse_api_base, read_key
from rgsd.progress import say
from rgsd.redaction import remember, remember_settings

DEFAULT_KEY_ENV = "RGSD_API_KEY"
"""The environment variable with the server's key, unless another is named."""
PROBE_TIMEOUT = 10.0
"""Seconds to wait for the server's list of models."""
UNFINISHED = frozenset({"error", "abort", "cancelled"})
"""Values of `finish_reason` with which the server, not the model, ended the text."""
NEUTRAL_SAMPLING: Mapping[str, Mapping[str, Any]] = {
    "vllm": {"repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0},
    "sglang": {"repetition_penalty": 1.0, "top_k": -1, "min_p": 0.0},
    "llamacpp": {"repeat_penalty": 1.0, "top_k": 0, "min_p": 0.0},
}
"""Fields that disable a server's own sampling defaults, some of which come from the checkpoint's generation_config. The
key is the `owned_by` of its models. OpenAI has no such fields, and other servers may refuse them."""


@dataclass
class _Server:
    """What a server's list of models reveals about it.

    Args:
        neutral: Fields that disable its own sampling defaults.
        models: The names of its models.
    """

    neutral: Mapping[str, Any] = field(default_factory=dict)
    models: Sequence[str] = ()


class ServerGenerator:
    """Generates through an OpenAI-compatible server: vLLM, SGLang, llama.cpp, `transformers serve`, or a provider.

    Transient faults are retried. A refusal that no retry can cure (a wrong key, an unknown model, an unknown field, a
    prompt that is too long) ends the call: requests in flight are awaited, then the error is raised. A prompt that
    fails in all its tries does not affect the others; its error is raised at the end. `done` receives every response
    either way.

    vLLM's, SGLang's and llama.cpp's servers are told to ignore their own sampling defaults (`NEUTRAL_SAMPLING`).
    `transformers serve` applies a checkpoint's repetition_penalty regardless; turn it off with
    extra_body={"frequency_penalty": 0.0}.

    Args:
        model: The server's name for the model.
        sampling: The sampling settings. `top_p` is sent only if the temperature is not 0.
        api_base: The server's address, up to and including /v1.
        api_key_env: The environment variable with the key. None reads RGSD_API_KEY, and sends no key if it is unset.
        concurrency: Requests in flight at once.
        timeout: Seconds for one request, to the last byte of its reply.
        retry: When to send a request again.
        extra_body: More fields of the request. They override all others.
        prompt_opens_thinking: Whether the chat template ends with the open tag (Qwen3-Thinking-2507) and the server
            does not split off reasoning. A response that is cut off before the close tag then is all reasoning.

    Raises:
        ConfigError: If a setting is out of range, the address is invalid, or the key is missing.
        ModelError: From `generate`, if the server refuses or some prompts get no response.
        PromptTooLong: From `generate`, if the server says that a prompt exceeds its context.
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
        retry: RetryPolicy | None = None,
        extra_body: Mapping[str, Any] | None = None,
        prompt_opens_thinking: bool = False,
    ) -> None:
        for name, value, least in (("concurrency", concurrency, 1), ("timeout", timeout, 0.001)):
            if value < least:
                raise ConfigError(f"{name} must be at least {least}, got {value}")
        self.model, self.sampling = model, sampling
        self.concurrency, self.timeout, self.retry = concurrency, timeout, retry or RetryPolicy()
        self.extra_body = dict(extra_body or {})
        self.prompt_opens_thinking = prompt_opens_thinking
        self.key_env = api_key_env or DEFAULT_KEY_ENV
        self._key = read_key(self.key_env, is_required=api_key_env is not None)
        remember(self._key)
        remember_settings([api_base, self.extra_body])
        self._base = parse_api_base(api_base)
        self.name = f"server:{model}"

    @property
    def address(self) -> str:
        """The server's address for messages: without user, password or query."""
        return str(self._base.copy_with(userinfo=b"", query=None))

    def generate(self, prompts: Sequence[Conversation], done: Done | None = None) -> list[Response]:
        """See `Generator.generate`. `done` is called as each response arrives."""
        if not prompts:
            return []
        responses: dict[int, Response] = {}
        failed: dict[int, ChatFault] = {}
        transport = HTTPTransport(self._base, self._key, connections=self.concurrency)

        def finish(i: int, result: Response | ChatFault) -> None:
            if isinstance(result, ChatFault):
                failed[i] = result
                return
            responses[i] = result
            if done is not None:
                done(i, result)

        with ChatClient(transport, concurrency=self.concurrency, timeout=self.timeout, retry=self.retry) as client:
            server = _Server()

            async def work(i: int) -> Response | ChatFault:
                return await self._respond(client, server, i, prompts)

            # Before any prompt, because the answer decides which fields are sent.
            client.run(lambda _: self._inspect(transport, server), [None], lambda *_: None, drain=False)
            client.run(work, range(len(prompts)), finish, drain=False)
        self._warn_of_unmarked_reasoning(list(responses.values()))
        if failed:
            raise self._failed(failed, prompts)
        return [responses[i] for i in range(len(prompts))]

    def keys(self, prompts: Sequence[Conversation]) -> list[ResponseKey]:
        """See `Generator.keys`.

        A server does not identify its weights. Its address and the model's name take their place, so other weights
        under the same name go unnoticed.
        """
        body = {k: v for k, v in self._body([], {}).items() if k != "messages"}
        settings = {
            **body, "backend": "server", "opens": self.prompt_opens_thinking, "tags": self.sampling.think_tags,
        }  # fmt: skip
        sent = [[[m["role"], m["content"]] for m in p] for p in prompts]
        return response_keys(f"{self.name} at {self.address}", settings, sent, self.sampling.temperature)

    async def _inspect(self, transport: HTTPTransport, server: _Server) -> None:
        """Fetch the list of models to learn the kind of server. It is fine if the server does not answer."""
        try:
            async with asyncio.timeout(min(PROBE_TIMEOUT, self.timeout)):
                listed = await transport.models()
        except TimeoutError:
            return
        server.models = [str(m.get("id")) for m in listed]
        # A server with a single model often lists it under another name.
        owners = {str(m.get("owned_by")) for m in listed if m.get("id") == self.model or len(listed) == 1}
        server.neutral = next((NEUTRAL_SAMPLING[o] for o in owners if o in NEUTRAL_SAMPLING), {})

    async def _respond(
        self, client: ChatClient, server: _Server, i: int, prompts: Sequence[Conversation]
    ) -> Response | ChatFault:
        """The response, or the fault of its last try."""
        try:
            reply = await client.ask(self._body(prompts[i], server.neutral), check=_check_is_finished)
        except ChatFault as fault:
            if not fault.is_transient:
                raise self._refused(fault, described(i, prompts), server.models) from fault
            # Otherwise a run against a dead server would retry every prompt in turn.
            if client.has_given_up:
                raise ModelError(
                    f"the server at {self.address} failed {client.failures_in_a_row} prompts in a row, "
                    f"{self.retry.retries + 1} tries each, last with: {fault}. Responses so far are kept: check that "
                    "the server is up, then run the same command again"
                ) from fault
            return fault
        return self._response(reply)

    def _body(self, prompt: Conversation, neutral: Mapping[str, Any]) -> dict[str, Any]:
        """The request as OpenAI defines it, plus the fields that this server needs."""
        s = self.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": m["role"], "content": m["content"]} for m in prompt],
            "max_tokens": s.max_new_tokens,
        }
        if s.temperature is not None:
            body["temperature"] = s.temperature
        if not s.is_greedy:
            body["top_p"] = s.top_p
        if s.seed is not None:
            # A seed per prompt, so that a response does not depend on the order of requests.
            body["seed"] = s.seed if s.is_greedy else prompt_seed(s.seed, prompt)
        if s.chat_template_kwargs:
            body["chat_template_kwargs"] = dict(s.chat_template_kwargs)
        filters = dict(s.filters)
        # llama.cpp has its own name for it.
        if "repeat_penalty" in neutral and "repetition_penalty" in filters:
            filters["repeat_penalty"] = filters.pop("repetition_penalty")
        return {**body, **neutral, **filters, **self.extra_body}

    def _response(self, reply: ChatReply) -> Response:
        # A refusal is a response too: the judge reads it like any other.
        text = reply.text if reply.text is not None else reply.refusal
        is_truncated = reply.finish_reason in ("length", "content_filter")
        if reply.reasoning:
            open_tag, close_tag = self.sampling.think_tags
            # If the response was truncated before the answer began, the reasoning was never closed.
            rest = "" if is_truncated and not text else f"{close_tag}{text}"
            text = f"{open_tag}{reply.reasoning}{rest}"
        starts_in_thinking = self.prompt_opens_thinking and not reply.reasoning
        return Response(text, reply.completion_tokens or 0, is_truncated, starts_in_thinking)

    def _warn_of_unmarked_reasoning(self, responses: Sequence[Response]) -> None:
        """Warn if truncated responses may be reasoning without tags."""
        open_tag, close_tag = self.sampling.think_tags
        unopened = [r for r in responses if not r.starts_in_thinking and open_tag not in r.text]
        n_cut = sum(r.is_truncated and close_tag not in r.text for r in unopened)
        if n_cut and any(close_tag in r.text for r in unopened):
            say(
                f"  {self.model} closes reasoning that its prompt opened, and {n_cut} responses were cut off before "
                "they closed it: these count as answers. Raise max_new_tokens, give the server a reasoning parser, or "
                "set prompt_opens_thinking"
            )

    def _failed(self, failed: Mapping[int, ChatFault], prompts: Sequence[Conversation]) -> ModelError:
        first = min(failed)
        return ModelError(
            f"{len(failed)} of {len(prompts)} prompts got no response from the server at {self.address} in "
            f"{self.retry.retries + 1} tries each; {described(first, prompts)}: {failed[first]}. The other responses "
            "are kept: check the server, raise timeout or lower concurrency, and run the same command again"
        )

    def _refused(self, fault: ChatFault, prompt: str, models: Sequence[str]) -> RGSDError:
        """The error for a refusal that no retry can fix, with its remedy."""
        what = f"the server at {self.address} refused {prompt}: {fault}"
        kept = "Responses so far are kept"
        match fault.problem:
            case Problem.NO_CREDIT:
                return ModelError(
                    f"{what}: the account has no credit left. Add some and run the same command again. {kept}"
                )
            case Problem.DENIED | Problem.NO_KEY:
                sent = f"the key in {self.key_env}" if self._key else f"no key, because {self.key_env} is not set"
                return ModelError(f"{what}. It got {sent}: set {self.key_env} to a key for {self.model!r}. {kept}")
            case Problem.NOT_FOUND:
                known = f"the server has {', '.join(models[:20])}" if models else "ask the server for its models"
                return ModelError(
                    f"{what}: there is no model {self.model!r}, or no /chat/completions at this address. Check the "
                    f"model ({known}) and api_base, which usually ends in /v1. {kept}"
                )
            case Problem.TOO_LONG:
                return PromptTooLong(
                    f"{what}: prompt and max_new_tokens ({self.sampling.max_new_tokens:,}) exceed its context. Lower "
                    "max_new_tokens, remove the prompt, or start the server with a longer context. Prompts are never "
                    f"truncated. {kept}"
                )
            case Problem.REDIRECT:
                return ModelError(f"{what}: it redirects. Set api_base to the address that it names. {kept}")
            case Problem.WAIT_TOO_LONG:
                return ModelError(f"{what}. {kept}: run the same command again later")
        return ModelError(
            f"{what}. If it names a field that it does not take: seed and temperature are left out when None, "
            f"chat_template_kwargs when unset, and extra_body adds others. {kept}"
        )


def _check_is_finished(reply: ChatReply) -> None:
    """Refuse a reply that the server aborted, or that lacks token counts, so that it is requested again."""
    if reply.completion_tokens is None:
        raise ChatFault(Problem.MALFORMED, "not a chat completion with token counts")
    if reply.finish_reason in UNFINISHED:
        raise ChatFault(Problem.UNFINISHED, f"the server aborted the text (finish_reason {reply.finish_reason!r})")
