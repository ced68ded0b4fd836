"""Replies on disk: shared by processes, intact after a kill, and never paid for twice."""

import json
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from support.openai_server import OpenAIServer, asked_ids

from rgsd.errors import ConfigError, JudgeError
from rgsd.judges import JudgeConfig, build_judge
from rgsd.judges.cache import ReplyCache
from rgsd.rubrics import Criterion, Example, Rubric


def test_what_is_put_is_there_in_another_opening(tmp_path):
    cache = ReplyCache(tmp_path / "deep" / "judge.sqlite")
    assert cache.get("k") is None
    assert cache.claim("k", 60)
    assert not cache.claim("k", 60)
    cache.put("k", {"text": "hullo \u00e9"})
    cache.close()
    again = ReplyCache(tmp_path / "deep" / "judge.sqlite")
    assert again.get("k") == {"text": "hullo \u00e9"}
    assert again.claim("k", 60)


def test_a_released_or_expired_claim_can_be_taken(tmp_path):
    cache = ReplyCache(tmp_path / "c.sqlite")
    assert cache.claim("a", 60)
    cache.release("a")
    assert cache.claim("a", 60)
    assert cache.claim("b", 0.01)
    time.sleep(0.02)
    assert cache.claim("b", 60)


@pytest.mark.parametrize(
    "row",
    [
        {"machine": "elsewhere", "until": time.time() + 10**7},  # its clock is ahead: nobody would wait for the end
        {"machine": "elsewhere", "until": float("inf")},
        {"until": "later"},
        {"pid": 10**18},
        {"pid": -5},
        {"pid": 0},
        {"pid": "one"},
    ],
    ids=lambda row: "-".join(row),
)
def test_a_damaged_claim_is_void(tmp_path, row):
    cache = ReplyCache(tmp_path / "c.sqlite")
    lease = {"key": "k", "owner": "o", "machine": cache._me.machine, "pid": 1, "started": "s", "until": time.time() + 9}
    cache._db.execute("INSERT INTO leases VALUES (?, ?, ?, ?, ?, ?)", tuple((lease | row).values()))
    assert cache.claim("k")
    assert not cache.claim("k")  # it is this opening's now, and no transaction is left open


@pytest.mark.parametrize("wrong", [{"text": 5}, {"code": 1}, {"finish_reason": []}, {"is_refusal": "x"}], ids=str)
def test_a_damaged_unusable_reply_counts_as_none(tmp_path, wrong):
    cache = ReplyCache(tmp_path / "c.sqlite")
    sound = {"text": "t", "code": "c", "finish_reason": "stop", "is_refusal": False}
    cache.put_unusable("k", [sound])
    assert cache.unusable("k") == [sound]
    cache.put_unusable("k", [sound | wrong])
    assert cache.unusable("k") == []


def test_a_stored_reply_without_its_code_is_asked_for_again(tmp_path):
    def grant(request):
        return json.dumps({"verdicts": [{"id": i, "met": True} for i in asked_ids(request)]})

    with OpenAIServer(grant) as server:
        config = JudgeConfig(judge="local/j", judge_api_base=server.url, judge_cache=str(tmp_path / "c.sqlite"))
        example = Example("e", ({"role": "user", "content": "Q?"},), Rubric((Criterion("Rest."),)))
        for damage in (None, '{"text": "x"}', '{"text": "x", "code": 7}', "[1]"):
            if damage:
                with sqlite3.connect(tmp_path / "c.sqlite") as db:
                    db.execute("UPDATE replies SET reply = ?", (damage,))
                db.close()
            judge = build_judge(config)
            assert [v.met for v in judge.judge(example, "Rest.").verdicts] == [True]
            judge.close()
        assert len(server.records()) == 4


def test_the_claim_of_a_killed_process_is_void(tmp_path):
    path = tmp_path / "c.sqlite"
    code = (
        "import sys, time; from pathlib import Path; from rgsd.judges.cache import ReplyCache\n"
        f"print(ReplyCache(Path({str(path)!r})).claim('k', 600), flush=True); time.sleep(600)"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline().strip() == "True"
    cache = ReplyCache(path)
    assert not cache.claim("k", 60)
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert cache.claim("k", 60)


def _claimed(path, barrier, won):
    cache = ReplyCache(path)
    barrier.wait()
    for key in range(200):
        if cache.claim(str(key), 60):
            won.put((key, os.getpid()))
            cache.put(str(key), {"text": str(os.getpid())})
    cache.close()


def test_of_several_processes_one_wins_each_claim(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, won = context.Barrier(3), context.Queue()
    path = tmp_path / "c.sqlite"
    ReplyCache(path).close()
    workers = [context.Process(target=_claimed, args=(path, barrier, won)) for _ in range(3)]
    for w in workers:
        w.start()
    for w in workers:
        w.join(60)
    claims = [won.get(timeout=5) for _ in range(won.qsize())]
    # A key may be claimed again after its reply is there (the judge looks first); never while it is being bought.
    assert {k for k, _ in claims} == set(range(200))
    replies = sqlite3.connect(path).execute("SELECT COUNT(*) FROM replies").fetchone()[0]
    assert replies == 200
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone()[0] == "ok"


def test_a_file_that_is_no_cache_is_named(tmp_path):
    (tmp_path / "c.sqlite").write_text("not a database, but long enough to be taken for one" * 20)
    with pytest.raises(JudgeError, match=r"c\.sqlite.*judge_cache"):
        ReplyCache(tmp_path / "c.sqlite")


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"judge": "gpt-5.4"}, "gpt-5.4"),
        ({"judge": ""}, "empty"),
        ({"judge": "a/b", "judge_mode": "both"}, "judge_mode"),
        ({"judge": "a/b", "judge_concurrency": 0}, "judge_concurrency"),
        ({"judge": "a/b", "judge_budget": -1}, "judge_budget"),
        ({"judge": "a/b", "judge_price_input": 1.0}, "together"),
    ],
)
def test_bad_settings_are_refused_with_the_remedy(settings, match):
    with pytest.raises(ConfigError, match=match):
        JudgeConfig(**settings)


def test_a_budget_needs_a_price(tmp_path):
    config = JudgeConfig(
        judge="no/such-model", judge_api_base="http://127.0.0.1:9/v1", judge_budget=1.0, judge_cache="off"
    )
    with pytest.raises(ConfigError, match="judge_price_input"):
        build_judge(config)


def _lease(path, key, **changes):
    """Give the claim to another holder: this process, with these differences."""
    me = ReplyCache(path)._me
    row = {**me._asdict(), "owner": "other", "until": time.time() + 3600, **changes}
    names = ("owner", "machine", "pid", "started", "until")
    with sqlite3.connect(path) as db:
        db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?, ?, ?, ?)", (key, *(row[n] for n in names)))


def test_a_pid_that_is_used_again_does_not_keep_a_claim(tmp_path):
    # A container restarted: the same host, and pid 1 again, but another process.
    path = tmp_path / "c.sqlite"
    cache = ReplyCache(path)
    _lease(path, "k")
    assert not cache.claim("k")
    _lease(path, "k", started="12")
    assert cache.claim("k")


def test_a_claim_of_another_machine_lapses_with_its_lease_unless_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr("rgsd.judges.cache.LEASE", 0.4)
    monkeypatch.setattr("rgsd.judges.cache._machine", lambda: "elsewhere")
    other = ReplyCache(tmp_path / "c.sqlite")
    monkeypatch.undo()
    monkeypatch.setattr("rgsd.judges.cache.LEASE", 0.4)
    cache = ReplyCache(tmp_path / "c.sqlite")
    assert other.claim("k")
    time.sleep(0.3)
    other.renew()
    time.sleep(0.3)
    assert not cache.claim("k")
    time.sleep(0.3)
    assert cache.claim("k")


def test_on_a_full_disk_replies_stay_in_memory_and_are_written_later(tmp_path, capsys):
    cache = ReplyCache(tmp_path / "c.sqlite")
    pages = cache._db.execute("PRAGMA page_count").fetchone()[0]
    cache._db.execute(f"PRAGMA max_page_count={pages}")  # SQLite's own "database or disk is full"
    for i in range(20):
        assert cache.claim(f"k{i}")
        cache.put(f"k{i}", {"text": "x" * 5000, "n": i})
    assert [cache.get(f"k{i}")["n"] for i in range(20)] == list(range(20))
    assert capsys.readouterr().out.count("cannot be written") == 1
    cache._db.execute("PRAGMA max_page_count=100000")
    cache.renew()
    again = ReplyCache(tmp_path / "c.sqlite")
    assert [again.get(f"k{i}")["n"] for i in range(20)] == list(range(20))


def test_replies_that_never_could_be_written_are_counted_at_the_end(tmp_path, capsys):
    cache = ReplyCache(tmp_path / "c.sqlite")
    cache._db.execute(f"PRAGMA max_page_count={cache._db.execute('PRAGMA page_count').fetchone()[0]}")
    for i in range(3):
        cache.put(f"k{i}", {"text": "x" * 20000})
    cache.close()
    assert "3 replies could not be written" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["not json", "[]", "{}", '{"text": 3}', "[" * 100_000])
def test_a_damaged_reply_counts_as_none(tmp_path, content):
    cache = ReplyCache(tmp_path / "c.sqlite")
    cache.put("k", {"text": "yes"})
    with sqlite3.connect(tmp_path / "c.sqlite") as db:
        db.execute("UPDATE replies SET reply = ?", (content,))
    assert cache.get("k") is None
    assert cache.claim("k")
    cache.put("k", {"text": "again"})
    assert cache.get("k") == {"text": "again"}


@pytest.mark.parametrize("keep", [0, 100, 4096])
def test_a_zeroed_cache_is_an_error_of_ours(tmp_path, keep):
    path = tmp_path / "c.sqlite"
    cache = ReplyCache(path)
    for i in range(50):
        cache.put(f"k{i}", {"text": "x" * 500})
    cache.close()
    data = path.read_bytes()
    path.write_bytes(data[:keep] + bytes(len(data) - keep))
    with pytest.raises(JudgeError, match=r"c\.sqlite.*judge_cache"):
        ReplyCache(path).get("k1")


def test_a_locked_cache_is_an_error_of_ours_in_time(tmp_path, monkeypatch):
    monkeypatch.setattr("rgsd.judges.cache.LOCK_TIMEOUT", 0.3)
    path = tmp_path / "c.sqlite"
    ReplyCache(path).close()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("PRAGMA locking_mode=EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    start = time.monotonic()
    with pytest.raises(JudgeError, match="locked"):
        ReplyCache(path)
    assert time.monotonic() - start < 5


def test_a_cache_that_another_process_writes_to_for_long_loses_no_reply(tmp_path, capsys):
    path = tmp_path / "c.sqlite"
    cache = ReplyCache(path)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    cache.put("k", {"text": "paid"})
    assert cache.get("k") == {"text": "paid"}
    holder.execute("COMMIT")
    cache.close()
    assert ReplyCache(path).get("k") == {"text": "paid"}
