"""The LLM judge against a real, faulty server: no verdict lost, none invented, none paid for twice."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise

import pytest
from support.openai_server import CONTENT_FAULTS, TRANSPORT_FAULTS, Fault, OpenAIServer, asked_ids

from rgsd.errors import BudgetExhausted, ConfigError, JudgeError
from rgsd.inference.accounting import ledger_totals
from rgsd.judges import JudgeConfig, build_judge
from rgsd.judges.llm import Question
from rgsd.judges.prompt import object_schema, whole_object
from rgsd.judges.prompt import requests as requests_of
from rgsd.rubrics import Criterion, Example, Rubric

RUBRIC = Rubric((Criterion("Says one.", 3.0), Criterion("Says two.", -2.0), Criterion("Says three.", 1.0)))


def tasks(n):
    """Responses whose number decides every verdict: bit i is the verdict on criterion i."""
    made = []
    for i in range(n):
        example = Example(f"e{i}", ({"role": "user", "content": f"Question {i}?"},), RUBRIC)
        made.append((example, f"number {i}."))
    return made


def truth(i):
    return [bool(i >> bit & 1) for bit in range(3)]


def answer(request):
    """The verdicts of an ideal judge, from the text alone."""
    user = request["messages"][1]["content"]
    number = int(re.search(r"number (\d+)\.", user).group(1))
    ids = asked_ids(request)
    if "\nCriterion " in user:
        word = re.search(r"Criterion \S+: Says (\w+)\.", user).group(1)
        return json.dumps({"id": ids[0], "reason": "so", "met": truth(number)[["one", "two", "three"].index(word)]})
    verdicts = [{"id": i, "reason": "so", "met": m} for i, m in zip(ids, truth(number), strict=True)]
    return json.dumps({"verdicts": verdicts})


@pytest.fixture
def judge(tmp_path):
    """Builds judges on a server; closes them."""
    built = []

    def build(server, **settings):
        wanted = {
            "judge": "local/judge",
            "judge_api_base": server.url,
            "judge_cache": str(tmp_path / "cache.sqlite"),
            "judge_timeout": 5.0,
            "judge_retry_max_wait": 0.05,
        }
        built.append(build_judge(JudgeConfig(**{**wanted, **settings})))
        return built[-1]

    yield build
    for one in built:
        one.close()


def met(judgement):
    return [v.met for v in judgement.verdicts]


LEDGER = "requests.jsonl"
NURSERY = """
import os, sys; sys.path[:0] = [{tests!r}, {tests!r} + '/judges']
from test_llm_judge import tasks, truth, met
from rgsd.judges import JudgeConfig, build_judge
from pathlib import Path
from rgsd.errors import Interrupted
import httpx
print("ready", flush=True)
for line in sys.stdin:
    n, is_checked = int(line.split()[0]), "check" in line
    if os.fork():
        continue
    print(os.getpid(), flush=True)
    config = JudgeConfig(
        judge="local/judge", judge_api_base={url!r}, judge_cache={folder!r} + "/c.sqlite", judge_concurrency=4,
        judge_retry_max_wait=0.05,
    )
    judge = build_judge(config)
    judge.record_requests(Path({folder!r}) / {ledger!r}, "arm")
    try:
        found = judge.judge_all(tasks(n))
    except Interrupted:
        judge.close()
        print("stopped", flush=True)
        os._exit(143)
    if is_checked:
        assert [met(j) for j in found] == [truth(i) for i in range(n)]
    print("done", sum(j.usage.calls for j in found), flush=True)
    os._exit(0)
"""


class Nursery:
    """A process with all libraries imported that forks a judge for each requested number of tasks."""

    def __init__(self, server, folder):
        tests = os.path.dirname(os.path.dirname(__file__))
        code = NURSERY.format(tests=tests, url=server.url, folder=str(folder), ledger=LEDGER)
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout.readline() == "ready\n"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def start(self, n, *, check=True):
        """Fork a judge of n tasks; returns its pid."""
        self.process.stdin.write(f"{n} {'check' if check else ''}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def wait_for(self, word):
        """The next line that begins with the word."""
        while not (line := self.process.stdout.readline()).startswith(word):
            assert line, "the process has ended"
        return line


@pytest.mark.integration
def test_a_thousand_judgements_at_thirty_percent_faults(judge):
    faults = (*(f for f in TRANSPORT_FAULTS if f != "slow"), *CONTENT_FAULTS)
    with OpenAIServer(answer, fault_rate=0.3, faults_drawn=faults, seed=1, retry_after=0.01) as server:
        # Enough tries for every one: then every verdict is there, and is the judge's own.
        one = judge(server, judge_retries=12, judge_reasks=12)
        seen = {}
        found = one.judge_all(tasks(1000), done=seen.__setitem__)
        assert [met(j) for j in found] == [truth(i) for i in range(1000)]
        assert Counter(j.problem for j in found) == {"": 1000}
        assert seen == dict(enumerate(found))
        assert len(server.records()) > 1200
        assert server.bought_twice() == []
        assert server.max_concurrency <= 16
        assert one.usage.calls == sum(j.usage.calls for j in found)
        # A request can be lost on a kept connection that the server is closing: it counts as sent, but never arrives.
        assert len(server.records()) <= one.usage.calls <= len(server.records()) + 5
        # Again, by a new judge: everything comes from the disk.
        before = len(server.records())
        again = judge(server).judge_all(tasks(1000))
        assert [met(j) for j in again] == [met(j) for j in found]
        assert all(j.usage.calls == 0 and j.usage.cached == 1 for j in again)
        assert len(server.records()) == before


def test_with_too_few_tries_some_are_unscored_and_none_is_wrong(judge):
    faults = (*(f for f in TRANSPORT_FAULTS if f != "slow"), *CONTENT_FAULTS)
    with OpenAIServer(answer, fault_rate=0.6, faults_drawn=faults, seed=2, retry_after=0.01) as server:
        one = judge(server, judge_retries=0, judge_reasks=0, judge_give_up_after=10_000)
        found = one.judge_all(tasks(300))
        unscored = [i for i, j in enumerate(found) if j.problem]
        assert 100 < len(unscored) < 250
        for i, j in enumerate(found):
            assert met(j) == ([None] * 3 if j.problem else truth(i))
            assert all(v.reason.startswith("unscored (") for v in j.verdicts) == bool(j.problem)
        problems = {j.problem for j in found}
        assert {"rate limit", "refusal", "count", "malformed", "cut"} <= problems
        # Asked again, only those are bought.
        server.fault_rate = 0.0
        before = len(server.records())
        later = judge(server).judge_all(tasks(300))
        assert [met(j) for j in later] == [truth(i) for i in range(300)]
        assert len(server.records()) - before == len(unscored)


@pytest.mark.parametrize("fault", CONTENT_FAULTS)
def test_a_reply_that_cannot_be_used_is_asked_for_again_then_unscored(judge, fault):
    with OpenAIServer(answer, script=[fault] * 3) as server:
        found = judge(server, judge_reasks=2).judge(*tasks(6)[5])
        assert met(found) == [None] * 3
        assert found.usage.calls == 3
        assert found.problem
        assert found.replies or fault in ("empty_content", "refusal")
        assert met(judge(server).judge(*tasks(6)[5])) == truth(5)


def test_a_hanging_server_is_given_up_and_the_reply_is_unscored(judge):
    with OpenAIServer(answer, script=["hang", "hang"]) as server:
        start = time.monotonic()
        found = judge(server, judge_timeout=0.5, judge_retries=1).judge(*tasks(1)[0])
        assert found.problem == "timeout"
        assert met(found) == [None] * 3
        assert time.monotonic() - start < 5


def test_retry_after_holds_everybody_back(judge):
    with OpenAIServer(answer, script=[Fault("429", retry_after=0.6)]) as server:
        one = judge(server, judge_retry_max_wait=5.0, judge_concurrency=4)
        found = one.judge_all(tasks(30))
        assert [met(j) for j in found] == [truth(i) for i in range(30)]
        times = sorted(r.at for r in server.records())
        gaps = [b - a for a, b in pairwise(times)]
        assert max(gaps) >= 0.5  # no request in between


@pytest.mark.parametrize(
    ("fault", "match"),
    [("401", "status 401"), ("404", "status 404"), ("quota", "status 429.*insufficient_quota"), ("403", "status 403")],
)
def test_what_no_other_try_cures_ends_it_and_keeps_what_was_judged(judge, fault, match):
    with OpenAIServer(answer, script=[None] * 10 + [fault] * 500) as server:
        one = judge(server, judge_concurrency=2)
        kept = {}
        with pytest.raises(JudgeError, match=match):
            one.judge_all(tasks(100), done=kept.__setitem__)
        assert 8 <= len(kept) <= 10
        assert all(met(j) == truth(i) for i, j in kept.items())
        assert len(server.records()) <= 13


def test_a_server_that_stays_down_ends_it(judge):
    with OpenAIServer(answer, script=lambda position, request: "503") as server:
        one = judge(server, judge_retries=1, judge_give_up_after=5, judge_concurrency=2)
        with pytest.raises(JudgeError, match="5 times in a row"):
            one.judge_all(tasks(100))
        assert len(server.records()) <= 16


def test_a_budget_of_calls_stops_cleanly_and_a_larger_one_goes_on(judge):
    with OpenAIServer(answer) as server:
        kept = {}
        with pytest.raises(BudgetExhausted, match="judge_max_calls is 40"):
            judge(server, judge_max_calls=40).judge_all(tasks(100), done=kept.__setitem__)
        assert len(kept) == len(server.records()) == 40
        found = judge(server, judge_max_calls=60).judge_all(tasks(100))
        assert [met(j) for j in found] == [truth(i) for i in range(100)]
        assert server.bought_twice() == []


@pytest.mark.parametrize("concurrency", [1, 4, 16])
@pytest.mark.parametrize("share", [20.0, 20.3, 40.97])
def test_a_budget_of_dollars_is_never_overspent(judge, concurrency, share):
    limits = {"judge_price_input": 1.0, "judge_price_output": 100.0, "judge_max_tokens": 64, "judge_cache": "off"}
    with OpenAIServer(answer, latency=0.01) as server:
        price = judge(server, **limits).judge(*tasks(1)[0]).usage.price
        assert price > 0
        one = judge(server, judge_budget=price * share, judge_concurrency=concurrency, **limits)
        with pytest.raises(BudgetExhausted, match="judge_budget"):
            one.judge_all(tasks(200))
        assert 0.5 * price * share < one.usage.price <= price * share
        assert one._client.account.budget.reserved == 0


def test_a_request_that_may_be_billed_without_a_reply_counts_in_full(judge):
    limits = {"judge_price_input": 1.0, "judge_price_output": 100.0, "judge_max_tokens": 64, "judge_timeout": 0.3}
    with OpenAIServer(answer, script=lambda position, request: "hang") as server:
        one = judge(server, judge_budget=0.02, judge_retries=20, **limits)
        with pytest.raises(BudgetExhausted):
            one.judge(*tasks(1)[0])
        assert 1 <= len(server.records()) <= 3  # 64 tokens cost 0.0064, and the prompt a little


def test_a_budget_needs_a_bound_on_the_reply(judge):
    prices = {"judge_price_input": 1.0, "judge_price_output": 1.0}
    with OpenAIServer(answer) as server, pytest.raises(ConfigError, match="judge_max_tokens"):
        judge(server, judge_budget=1.0, **prices)


@pytest.mark.integration
def test_unusable_replies_of_a_killed_process_are_not_bought_again(tmp_path):
    def script(position, request):
        return "hang" if position == 1 else "prose"

    with OpenAIServer(answer, script=script) as server:
        with Nursery(server, tmp_path) as nursery:
            pid = nursery.start(1)
            while len(server.records()) < 2:
                time.sleep(0.002)
            os.kill(pid, signal.SIGKILL)
            nursery.start(1, check=False)
            nursery.wait_for("done")
        assert server.faults() == ["prose", "hang", "prose", "prose"]  # three tries in all, and the one in flight


@pytest.mark.integration
def test_every_request_sent_is_in_the_ledger_also_those_of_killed_processes(tmp_path):
    with OpenAIServer(
        answer, latency=0.02, script=lambda position, request: "500" if position % 7 == 3 else None
    ) as server:
        with Nursery(server, tmp_path) as nursery:
            for n_requests in (5, 40, 90):
                pid = nursery.start(100)
                while len(server.records()) < n_requests:
                    time.sleep(0.002)
                os.kill(pid, signal.SIGKILL)
            nursery.start(100)
            nursery.wait_for("done")
        n = len(server.records())
        usage = ledger_totals(tmp_path / LEDGER)["arm"]
        assert n <= usage.calls <= n + 3  # a request may be recorded and its process killed before it is sent
        assert usage.completion_tokens > 0


@pytest.mark.integration
def test_sigterm_waits_for_replies_in_flight(tmp_path):
    with OpenAIServer(answer, latency=0.3) as server:
        with Nursery(server, tmp_path) as nursery:
            pid = nursery.start(40)
            while len(server.records()) < 9:
                time.sleep(0.002)
            os.kill(pid, signal.SIGTERM)
            nursery.wait_for("stopped")
            sent = len(server.records())
            assert sent <= 12
            nursery.start(40)
            nursery.wait_for("done")
        assert server.bought_twice() == []
        assert len(server.records()) == 40


def test_an_unknown_price_is_unknown_and_not_nothing(judge):
    with OpenAIServer(answer) as server:
        one = judge(server)
        assert one.judge(*tasks(1)[0]).usage.price is None
        assert one.usage.price is None
        assert one.usage.prompt_tokens > 0


def test_per_criterion_makes_a_call_each_and_loses_one_alone(judge):
    with OpenAIServer(answer, script=[None, "refusal", None]) as server:
        one = judge(server, judge_mode="per_criterion", judge_reasks=0, judge_concurrency=1)
        found = one.judge(*tasks(8)[7])
        assert sorted(map(str, met(found))) == ["None", "True", "True"]
        assert found.usage.calls == 3
        assert found.problem == "refusal"
        assert one.name != judge(server).name


def test_other_settings_buy_other_replies(judge):
    with OpenAIServer(answer) as server:
        changes = [
            {}, {"judge_temperature": 0.0}, {"judge_sample": 1}, {"judge_strictness": "strict"}, {"judge": "other/m"},
            {"judge_mode": "per_criterion"}, {"judge_structured": False}, {"judge_max_tokens": 99},
        ]  # fmt: skip
        for change in changes:
            before = len(server.records())
            judge(server, **change).judge(*tasks(1)[0])
            assert len(server.records()) > before, change
        for change in changes:
            before = len(server.records())
            judge(server, **change, judge_concurrency=3, judge_retries=1).judge(*tasks(1)[0])
            assert len(server.records()) == before, change


def test_the_request_has_a_schema_and_no_weights_and_the_key_stays_out_of_sight(judge, monkeypatch, tmp_path):
    monkeypatch.setenv("RGSD_JUDGE_API_KEY", "sk-secret")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")
    with OpenAIServer(answer) as server:
        found = judge(server).judge(*tasks(1)[0])
        (record,) = server.records()
        sent = record.body
        assert sent["model"] == "local/judge"
        assert sent["response_format"]["json_schema"]["schema"]["required"] == ["verdicts"]
        assert sent["temperature"] == 1.0
        assert record.headers["authorization"] == "Bearer sk-secret"
        assert "sk-secret" not in repr(found)
        assert b"sk-secret" not in (tmp_path / "cache.sqlite").read_bytes()
        monkeypatch.delenv("RGSD_JUDGE_API_KEY")
        judge(server, judge_cache="off", judge_structured=False).judge(*tasks(1)[0])
        assert "sk-of-another-server" not in str(server.records()[-1].headers)
        assert "response_format" not in server.records()[-1].body


def test_a_server_without_schemas_is_told_how(judge):
    fault = Fault("400", text="Unexpected field: response_format")
    with OpenAIServer(answer, script=[fault]) as server, pytest.raises(JudgeError, match="judge_structured"):
        judge(server).judge(*tasks(1)[0])


def test_free_questions_share_cache_and_retries(judge):
    def claims(request):
        return json.dumps({"claims": [request["messages"][1]["content"]]})

    def read(reply, code):
        return whole_object(reply)["claims"]

    schema = object_schema({"claims": {"type": "array", "items": {"type": "string"}}})
    questions = [Question(lambda code, i=i: ("list", f"text {i}"), schema, read) for i in range(50)]
    with OpenAIServer(
        claims, fault_rate=0.3, seed=3, faults_drawn=("500", "bad_json", "cut"), retry_after=0.01
    ) as server:
        one = judge(server, judge_retries=9, judge_reasks=9)
        assert one.ask_all(questions) == [[f"text {i}"] for i in range(50)]
        before = len(server.records())
        assert one.ask_all(questions) == [[f"text {i}"] for i in range(50)]
        assert len(server.records()) == before


@pytest.fixture
def slow_server():
    with OpenAIServer(answer, script=lambda position, request: Fault("slow", delay=0.02)) as server:
        yield server


@pytest.mark.integration
def test_two_processes_buy_each_reply_once(tmp_path):
    # Slow enough that on a busy machine the second process starts before the first has asked for everything.
    slow = OpenAIServer(answer, script=lambda position, request: Fault("slow", delay=0.25))
    with slow as server, Nursery(server, tmp_path) as nursery:
        nursery.start(150)
        nursery.start(150)
        bought = [int(nursery.wait_for("done").split()[1]) for _ in range(2)]
        assert server.bought_twice() == []
        assert len(server.records()) == 150 == sum(bought)
        assert min(bought) > 0


@pytest.mark.integration
def test_killed_at_random_points_it_goes_on_and_loses_no_more_than_what_was_in_flight(slow_server, tmp_path):
    kills = (1, 37, 90, 161)
    with Nursery(slow_server, tmp_path) as nursery:
        for n_requests in kills:
            pid = nursery.start(200)
            while len(slow_server.records()) < n_requests:
                time.sleep(0.002)
            os.kill(pid, signal.SIGKILL)
        nursery.start(200)
        nursery.wait_for("done")
    # At most the four requests in flight at each kill came to nothing.
    assert 200 <= len(slow_server.records()) <= 200 + 4 * len(kills)
    assert sum(n - 1 for n in slow_server.good_replies().values()) <= 4 * len(kills)


def test_replies_in_flight_are_kept_when_the_caller_fails(judge):
    """As with a full disk: requests that were paid for are not sent again."""
    with OpenAIServer(answer, latency=0.2) as server:
        one = judge(server, judge_concurrency=8)

        def fail(i, judgement):
            raise OSError(28, "No space left on device")

        with pytest.raises(OSError, match="No space left"):
            one.judge_all(tasks(40), done=fail)
        one.close()
        sent = len(server.records())
        assert 0 < sent < 40
        found = judge(server, judge_concurrency=8).judge_all(tasks(40))
        assert [met(j) for j in found] == [truth(i) for i in range(40)]
        assert len(server.records()) == 40


def test_on_a_full_disk_at_the_cache_every_verdict_comes_back(judge, capsys):
    with OpenAIServer(answer) as server:
        one = judge(server)
        pages = one._cache._db.execute("PRAGMA page_count").fetchone()[0]
        one._cache._db.execute(f"PRAGMA max_page_count={pages}")
        many = [(e, f"{text} {'x' * 3000}") for e, text in tasks(60)]
        found = one.judge_all(many)
        assert [met(j) for j in found] == [truth(i) for i in range(60)]
        # The same judge does not pay again.
        assert [met(j) for j in one.judge_all(many)] == [truth(i) for i in range(60)]
        assert len(server.records()) == 60
        one.close()
    assert "could not be written" in capsys.readouterr().out


def test_a_wait_for_another_process_is_announced(judge, monkeypatch, capsys):
    monkeypatch.setattr("rgsd.judges.llm.ANNOUNCE_AFTER", 0.1)
    with OpenAIServer(answer) as server:
        one = judge(server)
        monkeypatch.setattr("rgsd.judges.cache.LEASE", 0.6)
        other = judge(server)
        for key in [one._key(r) for t in tasks(1) for r in requests_of(*t, mode="batched", strictness="plain")]:
            assert other._cache.claim(key)
        assert met(one.judge_all(tasks(1))[0]) == truth(0)
        assert "waiting for a reply that process" in capsys.readouterr().out


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("fault", ["401", "404", "500", "400", "quota"])
def test_a_test_call_ends_it_at_once_with_the_servers_reason(judge, fault, lazily):
    with OpenAIServer(answer, script=[fault] * 50) as server:
        one = judge(server)
        start = time.monotonic()
        if lazily:
            one.test_call(lazily=True)
        with pytest.raises(JudgeError):
            one.judge_all(tasks(20)) if lazily else one.test_call()
        assert time.monotonic() - start < 20
        assert len(server.records()) == (3 if fault == "500" else 1)  # final errors are not retried


def test_a_test_call_finds_a_closed_port_and_a_missing_key(tmp_path, monkeypatch):
    for name in ("OPENAI_API_KEY", "RGSD_JUDGE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    closed = {"judge": "local/j", "judge_api_base": "http://127.0.0.1:9/v1"}
    for settings, word in ((closed, "no connection"), ({"judge": "openai/gpt-4o"}, "OPENAI_API_KEY")):
        one = build_judge(JudgeConfig(judge_cache="off", **settings))
        start = time.monotonic()
        with pytest.raises(JudgeError, match=word):
            one.test_call()
        assert time.monotonic() - start < 20
        one.close()


def test_a_test_call_is_counted_and_none_is_sent_when_the_cache_has_all(judge):
    def greets(request):
        is_test = "Says hello." in request["messages"][1]["content"]
        return "Yes." if is_test else answer(request)  # any answer passes the test call

    with OpenAIServer(greets) as server:
        one = judge(server)
        one.test_call()
        assert one.usage.calls == len(server.records()) == 1
        assert one.usage.prompt_tokens > 0
        one.judge_all(tasks(5))
        assert one.usage.calls == len(server.records()) == 6
        again = judge(server)
        again.test_call(lazily=True)
        again.judge_all(tasks(5))
        assert len(server.records()) == 6
        again.judge_all(tasks(7))
        assert len(server.records()) == 9  # the test call and two more
        skipped = judge(server, judge_test_call=False)
        skipped.test_call()
        assert len(server.records()) == 9
