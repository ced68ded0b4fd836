"""The chat client's parts: the budget, the ledger, prices, and LiteLLM's transport against a faulty server."""

import asyncio
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.openai_server import OpenAIServer, Reply, openai_server_fixture  # noqa: F401 - a fixture

from rgsd.errors import BudgetExhausted, ConfigError
from rgsd.inference.accounting import Budget, RequestLedger, Usage, ledger_totals, listed_model
from rgsd.inference.chat import MAX_RETRY_AFTER, ChatClient, RetryPolicy
from rgsd.inference.replies import ChatFault, ChatReply, Problem, fault_of, parse_completion, parse_retry_after
from rgsd.inference.transports import LiteLLMTransport

BODY = {"model": "openai/gpt-4o", "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 9}


class Scripted:
    """A transport that answers from a list: replies and faults."""

    def __init__(self, *script):
        self.script, self.bodies = list(script), []

    async def send(self, body):
        self.bodies.append(body)
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step

    async def close(self):
        pass


def ask(transport, retry=None, **options):
    with ChatClient(transport, retry=retry or RetryPolicy(first_wait=0.0)) as client:
        return client.start(client.ask(BODY, **options)).result(timeout=10), client


# The budget.


@settings(max_examples=200, deadline=None)
@given(
    st.floats(0.0, 3.0),
    st.lists(st.tuples(st.floats(0.001, 1.0), st.floats(0.0, 1.0)), min_size=1, max_size=30),
    st.integers(1, 8),
)
def test_no_order_of_requests_overspends_a_budget(dollars, requests, concurrency):
    async def spend():
        budget, waiting = Budget(dollars=dollars), iter(requests)

        async def worker():
            for most, share in waiting:
                try:
                    await budget.reserve(most)
                except BudgetExhausted:
                    return
                assert budget.spent + budget.reserved <= dollars + 1e-9
                await asyncio.sleep(0)
                budget.settle(most, most * share)

        await asyncio.gather(*(worker() for _ in range(concurrency)))
        return budget

    budget = asyncio.run(spend())
    assert budget.spent <= dollars + 1e-9
    assert budget.reserved == 0.0


# Retries.


def test_usage_counts_every_try():
    transport = Scripted(
        fault_of(500, "down"),
        ChatFault(Problem.TIMEOUT, "slow"),
        ChatReply("yes", prompt_tokens=3, completion_tokens=2),
    )
    reply, client = ask(transport)
    assert reply.text == "yes"
    assert (reply.usage.calls, reply.usage.prompt_tokens) == (3, 3)
    assert client.usage.calls == 3


def test_a_fault_that_no_retry_cures_is_sent_once():
    for status in (400, 401, 404, 413, 422):
        transport = Scripted(fault_of(status, "no"), ChatReply("yes"))
        with pytest.raises(ChatFault) as caught:
            ask(transport)
        assert caught.value.status == status
        assert caught.value.usage.calls == len(transport.bodies) == 1


def test_the_longest_wait_is_limited():
    transport = Scripted(fault_of(429, "busy", MAX_RETRY_AFTER + 1), ChatReply("yes"))
    with pytest.raises(ChatFault) as caught:
        ask(transport)
    assert caught.value.problem is Problem.WAIT_TOO_LONG
    assert len(transport.bodies) == 1


def test_the_newer_name_of_the_limit_is_remembered():
    transport = Scripted(fault_of(400, "use max_completion_tokens"), ChatReply("a"), ChatReply("b"))
    with ChatClient(transport, retry=RetryPolicy(retries=0)) as client:
        for _ in range(2):
            client.start(client.ask(BODY)).result(timeout=10)
    assert ["max_tokens" in b for b in transport.bodies] == [True, False, False]


@pytest.mark.parametrize("wrong", [{"retries": -1}, {"first_wait": -0.1}, {"max_wait": -1.0}, {"give_up_after": 0}])
def test_a_policy_out_of_range_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RetryPolicy(**wrong)


# Replies.


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["choices", "message", "content", "usage", "error", "finish_reason", "refusal"]), inner
            )
        ),
        max_leaves=12,
    )
)
def test_any_json_is_a_reply_or_a_fault(value):
    try:
        reply = parse_completion(json.dumps(value).encode())
    except ChatFault:
        return
    assert isinstance(reply.text, str | None)


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"[" * 100_000, b"NaN", b'"text"', b"{}"])
def test_bytes_that_are_no_completion_are_malformed(data):
    with pytest.raises(ChatFault) as caught:
        parse_completion(data)
    assert caught.value.problem is Problem.MALFORMED


@pytest.mark.parametrize("count", [-(10**6), 10**400, 10**12])
def test_a_count_of_tokens_that_cannot_be_true_is_unknown(count):
    """A negative count would pay money back into the budget; a huge one overflows a float."""
    usage = {"prompt_tokens": count, "completion_tokens": count}
    choice = {"finish_reason": "stop", "message": {"content": "Hi."}}
    reply = parse_completion(json.dumps({"choices": [choice], "usage": usage}).encode())
    assert (reply.prompt_tokens, reply.completion_tokens) == (None, None)


def test_a_finish_reason_is_a_short_text_without_credentials(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "canary-0123456789")
    choice = {"finish_reason": "canary-0123456789" * 100, "message": {"content": "Hi."}}
    reply = parse_completion(json.dumps({"choices": [choice]}).encode())
    assert reply.finish_reason is not None
    assert "canary" not in reply.finish_reason
    assert len(reply.finish_reason) <= 40


@pytest.mark.parametrize("value", ["Mon, 01 Jan 99999999999999999999 00:00:00 GMT", "", "soon", "9" * 5000, "nan"])
def test_a_retry_after_that_says_nothing_is_ignored(value):
    wait = parse_retry_after(value)
    assert wait is None or wait == 0 or wait > MAX_RETRY_AFTER


# The ledger.


def test_a_ledger_counts_requests_without_an_outcome(tmp_path):
    ledger = RequestLedger(tmp_path / "requests.jsonl", "base")
    ledger.finished(ledger.sent(), Usage(1, 0, 10, 5, 0.25, 1.5))
    ledger.sent()
    ledger.label = "trained"
    ledger.finished(ledger.sent(), Usage(1, 0, 1, 1, None))
    with ledger.path.open("a") as file:
        file.write('{"id": "half')
    totals = ledger_totals(ledger.path)
    assert totals["base"] == Usage(2, 0, 10, 5, 0.25, 1.5)
    assert totals["trained"] == Usage(1, 0, 1, 1, None)
    assert ledger_totals(tmp_path / "none.jsonl") == {}


def test_a_ledger_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    ledger = RequestLedger(tmp_path / "no folder" / "requests.jsonl")
    ledger.finished(ledger.sent(), Usage(calls=1))
    assert capsys.readouterr().out.count("no longer recorded") == 1


# LiteLLM.

pytest.importorskip("litellm")


def test_the_price_table_is_read_without_importing_litellm():
    code = (
        "import sys; from rgsd.inference.accounting import listed_model\n"
        "m = listed_model('openai/gpt-4o'); print(m.prices.input, m.max_output_tokens, 'litellm' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2.5", "16384", "False"]
    assert listed_model("no/such-model") is None


def test_the_highest_price_covers_long_prompts_and_cache_writes():
    claude = listed_model("anthropic/claude-sonnet-4-5")
    assert claude is not None
    assert claude.highest.input > claude.prices.input
    gpt = listed_model("openai/gpt-5.4")
    assert gpt is not None
    assert gpt.highest.output > gpt.prices.output


@pytest.fixture
def provider(monkeypatch, openai_server):
    """LiteLLM's "openai" provider, against our own server."""

    def start(answer=lambda request: "yes", **options):
        server = openai_server(answer, **options)
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_BASE", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "sk-of-a-provider")
        return server

    return start


@pytest.mark.integration
def test_litellm_gives_reply_and_price(provider):
    server = provider(lambda request: Reply("yes sk-of-a-provider", completion_tokens=4))
    reply, _ = ask(LiteLLMTransport())
    assert (reply.text, reply.finish_reason, reply.completion_tokens) == ("yes ***", "stop", 4)
    assert reply.usage.price == pytest.approx((reply.prompt_tokens * 2.5 + 4 * 10) / 1e6)
    assert [r.body["model"] for r in server.records()] == ["gpt-4o"]
    assert server.records()[0].headers["authorization"] == "Bearer sk-of-a-provider"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        ("401", Problem.DENIED), ("403", Problem.DENIED), ("404", Problem.NOT_FOUND), ("quota", Problem.NO_CREDIT),
        ("400", Problem.BAD_REQUEST), ("422", Problem.BAD_REQUEST), ("429", Problem.RATE_LIMIT),
        ("500", Problem.SERVER), ("503", Problem.SERVER), ("html", None), ("drop", None), ("cut", None),
        ("empty_choices", Problem.MALFORMED),
    ],
)  # fmt: skip
def test_litellm_sends_once_and_its_errors_are_classified(provider, fault, problem):
    server = provider(script=[fault] * 9)
    with pytest.raises(ChatFault) as caught:
        ask(LiteLLMTransport(), retries=0)
    assert len(server.records()) == 1
    assert caught.value.is_transient == (fault in ("429", "500", "503", "html", "drop", "cut", "empty_choices"))
    assert problem is None or caught.value.problem is problem
    assert caught.value.may_be_billed == (fault in ("html", "drop", "cut", "empty_choices"))
    assert "sk-of-a-provider" not in str(caught.value)


@pytest.mark.integration
def test_litellm_without_a_key_or_a_connection(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_API_BASE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ChatFault) as caught:
        ask(LiteLLMTransport())
    assert caught.value.problem is Problem.NO_KEY
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    with pytest.raises(ChatFault) as caught:
        ask(LiteLLMTransport("a-key"), retries=0)
    assert caught.value.problem is Problem.CONNECTION
    assert not caught.value.was_sent


@pytest.mark.integration
def test_litellm_has_no_cache_callbacks_or_telemetry(provider):
    server = provider()
    transport = LiteLLMTransport()
    with ChatClient(transport) as client:
        for _ in range(3):
            client.start(client.ask(BODY)).result(timeout=10)
    assert len(server.records()) == 3
    assert transport._litellm.cache is None
    assert transport._litellm.telemetry is False
    assert not transport._litellm.success_callback


@pytest.mark.integration
def test_a_server_of_ones_own_needs_no_litellm():
    code = (
        "import sys; sys.modules['litellm'] = None\n"
        "from rgsd.judges import JudgeConfig, build_judge\n"
        "from rgsd.rubrics import Criterion, Example, Rubric\n"
        "example = Example('e', ({'role': 'user', 'content': 'Q?'},), Rubric((Criterion('Says one.', 1.0),)))\n"
        "c = JudgeConfig(judge='m', judge_api_base=sys.argv[1], judge_cache='off', judge_reasks=0)\n"
        "print(build_judge(c).judge(example, 'A.').problem)"
    )
    with OpenAIServer(lambda request: "no verdict") as server:
        done = subprocess.run([sys.executable, "-c", code, server.url], capture_output=True, text=True)
    assert done.stdout.strip() == "malformed", done.stderr
