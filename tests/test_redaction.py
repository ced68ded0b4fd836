"""No credential reaches a file or a terminal, wherever it comes from and whatever a server returns."""

import base64
import html
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote

import jinja2
import pytest
import yaml
from conftest import write_recipes

from rgsd import redaction
from rgsd.cli import main
from rgsd.redaction import (
    redact,
    redact_arguments,
    redact_known,
    remember,
    without_credentials,
    without_url_credentials,
)
from rgsd.runs import create_run

JUDGE_KEY = "jk-4f9a8c7d6e5b4a39"
WRITER_KEY = "wk+0a1b2c3d/4e5f6a7b=="
PASSWORD = "pa55-in-the-url"
USER = "user-in-the-url"
QUERY_KEY = "qk-77aa88bb99cc"
HUB = "hf-tok-1122334455"
SECRETS = (JUDGE_KEY, WRITER_KEY, PASSWORD, USER, QUERY_KEY, HUB)


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch):
    monkeypatch.setattr(redaction, "_remembered", set())


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("POST http://me:pw1234@host:1/v1 failed", "POST http://***@host:1/v1 failed"),
        ("see https://h/v1?a=1&api-key=abcdef&b=2", "see https://h/v1?a=1&api-key=***&b=2"),
        ("at ?key=abc, or &access_token=xyz", "at ?key=*** or &access_token=***"),
        ("{'Authorization': 'Bearer abc.def-ghi'}", "{'Authorization': 'Bearer ***'}"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic ***"),
        ("Incorrect API key provided: sk-proj-0123456789abcdef.", "Incorrect API key provided: ***."),
        ("token hf_0123456789abcdefghij is bad", "token *** is bad"),
        ('{"api_key": "abc", "n": 1}', '{"api_key": "***", "n": 1}'),
        ("a bearer of good news; basic information", "a bearer of good news; basic information"),
        ("pad_token is unset, max_tokens=5", "pad_token is unset, max_tokens=5"),
    ],
)
def test_what_looks_like_a_credential_is_masked_in_messages(text, wanted):
    assert redact(text) == wanted


def test_rows_lose_known_values_and_nothing_else(monkeypatch):
    row = "Use curl -H 'Authorization: Bearer sk-aaaaaaaaaaaaaaaaaaaa' postgres://me:pw@db"
    assert redact_known(row) == row
    monkeypatch.setenv("SOME_API_KEY", "correct horse")
    assert redact_known("the correct horse runs, correct%20horse") == "the *** runs, ***"
    monkeypatch.setenv("SOME_API_KEY", "another-key-now")
    assert redact_known("correct horse, another-key-now") == "correct horse, ***"
    remember('with"quote')
    assert redact_known(json.dumps({"a": 'x with"quote y'})) == '{"a": "x *** y"}'


def test_every_usual_spelling_of_a_known_value_is_masked(monkeypatch):
    secret = "a/b+c&d<e>'f\"g\\h=1"
    monkeypatch.setenv("ODD_API_KEY", secret)
    spellings = [
        secret, json.dumps(secret), json.dumps(secret).replace("/", "\\/"), quote(secret, safe=""),
        quote(secret, safe="").lower(), html.escape(secret), str(jinja2.filters.escape(secret)),
        base64.b64encode(secret.encode()).decode(), base64.urlsafe_b64encode(secret.encode()).decode(),
    ]  # fmt: skip
    for spelling in spellings:
        assert redact_known(f"x {spelling} y").replace('"', "").replace("=", "") == "x *** y", spelling


def test_short_values_are_not_taken_for_credentials(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "1")
    remember("none")
    assert redact_known("1 of none") == "1 of none"


def test_a_long_text_is_read_in_linear_time():
    start = time.monotonic()
    for piece in ("a", "://a", "bearer ", "?api-", '"token":', "a-a_", "authorization "):
        redact(piece * (400_000 // len(piece)))
    assert time.monotonic() - start < 5


def test_settings_are_stored_without_credentials():
    settings = {
        "hub_token": HUB,
        "token": None,
        "model_init_kwargs": {"token": HUB, "num_labels": 2},
        "judge_api_base": "http://me:pw@host:8000/v1?api-key=abc&version=2",
        "judge_api_key_env": "MY_KEY",
        "pad_token": "<pad>",
        "clip": "token",
        "tags": ["a", "b"],
    }
    assert without_credentials(settings) == {
        "token": None,
        "model_init_kwargs": {"num_labels": 2},
        "judge_api_base": "http://host:8000/v1?version=2",
        "judge_api_key_env": "MY_KEY",
        "pad_token": "<pad>",
        "clip": "token",
        "tags": ["a", "b"],
    }
    same = "http://host:8000/v1?a=%20b&c"
    assert without_url_credentials(same) == same


def test_a_command_line_is_stored_without_credentials():
    argv = ["--hub_token", HUB, "--hub_token=" + HUB, "--judge_api_base", "http://me:pw@h/v1", "--model_init_kwargs",
            json.dumps({"token": HUB}), "--seed", "3"]  # fmt: skip
    assert redact_arguments(argv) == [
        "--hub_token", "***", "--hub_token=***", "--judge_api_base", "http://***@h/v1", "--model_init_kwargs",
        '{"token": "***"}', "--seed", "3",
    ]  # fmt: skip


class _Echo(BaseHTTPRequestHandler):
    """Answers every request with the full request. Good answers of the model echo too."""

    protocol_version = "HTTP/1.1"
    status = 400
    pad = 0

    def do_GET(self):
        self._send(404, {"error": "no"})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        heard = f"{'.' * self.pad} {self.path} {dict(self.headers)}"
        asked = json.loads(body)
        if asked["model"] == "writer":
            message = {"role": "assistant", "content": heard}
            self._send(200, _completion(message))
        elif self.status == 200:
            self._send(200, {"error": {"message": heard, "code": 1}})
        elif self.status == 299:
            self._send(200, _completion({"role": "assistant", "content": f"No verdict: {heard}"}))
        else:
            self._send(self.status, {"error": {"message": heard, "type": "echo"}})

    def _send(self, status, value):
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format, *args):
        pass


def _completion(message):
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


@pytest.fixture
def echo():
    handler = type("Handler", (_Echo,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield handler, server.server_port
    server.shutdown()
    server.server_close()


@pytest.mark.integration
@pytest.mark.parametrize("pad", [0, 100, 180])
@pytest.mark.parametrize("status", [400, 401, 422, 429, 500, 502, 200, 299])
def test_an_echoing_server_gets_no_key_into_a_run_the_cache_the_report_or_the_terminal(
    tmp_path, monkeypatch, capfd, echo, status, pad
):
    handler, port = echo
    handler.status, handler.pad = status, pad
    monkeypatch.setenv("JUDGE_SECRET_VARIABLE", JUDGE_KEY)  # no ending that tells that it is a key
    monkeypatch.setenv("WRITER", WRITER_KEY)
    monkeypatch.setenv("RGSD_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"Question {i}?", "rubric": [{"criterion": "Says so.", "weight": 1}]} for i in range(2)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    argv = ["eval", "writer", "--backend", "server", "--api_base", f"http://127.0.0.1:{port}/v1",
            "--api_key_env", "WRITER", "--data", str(tmp_path / "data.jsonl"), "--judge", "openai/j",
            "--judge_api_base", f"http://{USER}:{PASSWORD}@127.0.0.1:{port}/v1?api-key={QUERY_KEY}",
            "--judge_api_key_env", "JUDGE_SECRET_VARIABLE", "--judge_retries", "1", "--judge_retry_max_wait", "0.01",
            "--judge_reasks", "0", "--output_dir", str(tmp_path / "run"), "--max_new_tokens", "8"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["rgsd", *argv])
    assert main(argv) == 1  # the test call shows what the server said
    argv += ["--judge_test_call", "false"]
    monkeypatch.setattr("sys.argv", ["rgsd", *argv])
    assert main(argv) == 1  # no coverage, or a refused key
    if (tmp_path / "run" / "samples.jsonl").exists():
        main(["report", str(tmp_path / "run"), "-o", str(tmp_path / "report.html")])
    _assert_nothing_leaked(tmp_path, capfd)
    written = (tmp_path / "run" / "responses.jsonl").read_text()
    assert "Bearer ***" in written


def _assert_nothing_leaked(folder, capfd):
    shown = capfd.readouterr()
    places = {"stdout": shown.out.encode(), "stderr": shown.err.encode()}
    places |= {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for place, content in places.items():
        for secret in SECRETS:
            # Whole, or a beginning that could be guessed on from.
            assert secret[: len(secret) - 4].encode() not in content, f"{secret} in {place}"


@pytest.mark.integration
def test_hub_tokens_are_in_no_file_of_a_training_run(tmp_path, tokenizer, monkeypatch, capfd):
    rows = [{"prompt": f"Why {i}?", "rubric": [{"criterion": "Rest.", "check": {"any": ["rest"]}}]} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    write_recipes(tmp_path, tokenizer)
    argv = ["train", "--config", str(tmp_path / "recipe.yaml"), "--hub_token", HUB, "--save_strategy", "steps",
            "--save_steps", "1", "--model_init_kwargs", json.dumps({"token": HUB})]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["rgsd", *argv])
    assert main(argv) == 0
    _assert_nothing_leaked(tmp_path, capfd)
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert "token" not in (settings.get("model_init_kwargs") or {})
    assert json.loads((tmp_path / "run" / "run.json").read_text())["command"].count("***") == 2


def test_a_run_folder_takes_no_known_credential(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", HUB)
    run = create_run(tmp_path / "run", {"note": f"uses {HUB}"})
    run.append("samples.jsonl", [{"reason": f"the server said {HUB}"}])
    run.write("results.json", {"command": HUB})
    run.note(extra=HUB)
    for file in run.folder.iterdir():
        assert HUB not in file.read_text(), file.name
