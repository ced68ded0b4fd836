"""A fake of `vllm serve` as TRL's client speaks to it: the same paths over real HTTP, a tiny model behind them, whose
weights arrive by the weight-transfer protocol (over torch's store, since NCCL needs GPUs)."""

from __future__ import annotations

import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore
from transformers import AutoModelForCausalLM

SERVER_INFO = {
    "weight_transfer_config": {"backend": "nccl"},
    "model_config": {"logprobs_mode": "processed_logprobs", "max_logprobs": -1},
}


class FakeVLLM:
    """Serves one model; records every call and every set of weights that it receives."""

    def __init__(self, model: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.calls: list[tuple[str, Any]] = []
        self.updates: list[dict[str, torch.Tensor]] = []
        self._store: TCPStore | None = None
        self._received = 0
        self._updating = False
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.answer(None)

            def do_POST(self):
                length = int(self.headers.get("Content-Length") or 0)
                self.answer(json.loads(self.rfile.read(length) or b"null"))

            def answer(self, body):
                path = self.path.split("?")[0]
                server.calls.append((path, body))
                try:
                    code, reply = 200, server.reply(path, body)
                except KeyError:
                    code, reply = 404, {"error": f"no such path {path}"}
                data = json.dumps(reply).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def reply(self, path: str, body: Any) -> Any:
        answers = {
            "/health": dict,
            "/v1/models": lambda: {"data": [{"id": "tiny"}]},
            "/server_info": lambda: {"vllm_config": SERVER_INFO},
            "/get_world_size": lambda: {"world_size": 1},
            "/init_weight_transfer_engine": lambda: self._join(body["init_info"]),
            "/start_weight_update": lambda: self._update(True),
            "/update_weights": lambda: self._receive(body["update_info"]),
            "/finish_weight_update": lambda: self._update(False),
            "/reset_prefix_cache": lambda: {"success": True},
            "/v1/completions": lambda: self._complete(body),
        }
        return answers[path]()

    def _join(self, info: dict[str, Any]) -> Any:
        assert info["world_size"] == 2
        assert info["rank_offset"] == 1
        self._store = TCPStore(info["master_address"], info["master_port"], is_master=False)
        self._store.wait(["joined"])
        return {}

    def _update(self, begins: bool) -> Any:
        assert self._updating != begins, "updates must not be nested, nor end unbegun"
        self._updating = begins
        return {}

    def _receive(self, info: dict[str, Any]) -> Any:
        assert self._updating
        assert self._store is not None
        own = dict(self.model.named_parameters())
        update = {}
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            tensor = torch.load(io.BytesIO(self._store.get(f"tensor{self._received}")), weights_only=True)
            self._received += 1
            assert (str(tensor.dtype), list(tensor.shape)) == (f"torch.{dtype}", shape), name
            with torch.no_grad():
                own[name].copy_(tensor)
            update[name] = tensor
        assert update.keys() == own.keys(), "every weight must come, and no other"
        self.updates.append(update)
        return {}

    def _complete(self, body: dict[str, Any]) -> Any:
        assert body["return_token_ids"]
        choices = []
        for prompt in body["prompt"]:
            ids = torch.tensor([prompt])
            with torch.no_grad():
                out = self.model.generate(ids, max_new_tokens=body["max_tokens"], do_sample=False)
            told = out[0, len(prompt) :].tolist()
            choice: dict[str, Any] = {"prompt_token_ids": prompt, "token_ids": told, "logprobs": None}
            if body["logprobs"] is not None:
                with torch.no_grad():
                    log_p = self.model(out).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                values = [float(log_p[i, t]) for i, t in enumerate(told)]
                names = [f"token_id:{t}" for t in told]
                top = [{name: value} for name, value in zip(names, values, strict=True)]
                choice["logprobs"] = {"tokens": names, "token_logprobs": values, "top_logprobs": top}
            choices += [choice] * body["n"]
        return {"choices": choices}
