"""Timing, machine facts, and inputs that several benchmarks share."""

from __future__ import annotations

import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rgsd import models
from rgsd.data import load
from rgsd.prompts.messages import PromptSettings, training_rows

MODEL = "embedded-warm"


def machine() -> dict[str, Any]:
    """The machine and versions behind the numbers."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu
        )
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "extensions": sorted(k for k in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if flags.get(k)),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "trl", "peft")},
    }


def alternate(subjects: dict[str, Callable[[], Any]], *, rounds: int, warm: int = 1) -> dict[str, dict[str, Any]]:
    """Run the subjects in turn for `rounds` rounds, and return each one's median seconds.

    `wall` is elapsed time. `cpu` is the process's time over all threads, which other processes disturb less. A subject
    that returns a dict with `wall` and `cpu` times itself.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in subjects}
    for turn in range(warm + rounds):
        for name, run in subjects.items():
            gc.collect()
            cpu, wall = time.process_time(), time.perf_counter()
            own = run()
            spent = (time.perf_counter() - wall, time.process_time() - cpu)
            if isinstance(own, dict) and "wall" in own:
                spent = (own["wall"], own["cpu"])
            if turn >= warm:
                taken[name].append(spent)
    return {
        name: {
            "wall": statistics.median(w for w, _ in all_),
            "cpu": statistics.median(c for _, c in all_),
            "wall_each": [round(w, 4) for w, _ in all_],
            "cpu_each": [round(c, 4) for _, c in all_],
        }
        for name, all_ in taken.items()
    }


def ratios(timed: dict[str, dict[str, Any]], of: str, to: str) -> dict[str, float]:
    return {kind: round(timed[of][kind] / timed[to][kind], 3) for kind in ("wall", "cpu")}


def in_a_process_of_its_own(module: str, *arguments: Any) -> Any:
    """Run `python -m module arguments...` and parse its last line as JSON. Peak memory needs a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{module} {arguments} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def peak_mib() -> float:
    """Peak resident memory of this process, in MiB."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage also counts the parent process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 * 1024 if sys.platform == "darwin" else 1024)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' messages and progress bars."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with open(os.devnull, "w") as nowhere:
        out, sys.stdout = sys.stdout, nowhere
        try:
            yield
        finally:
            sys.stdout = out


def model() -> Any:
    with quiet():
        return models.load_model(MODEL)


@cache
def tokenizer() -> Any:
    with quiet():
        return models.load_tokenizer(MODEL)


def random_llama(*, vocabulary: int = 49152, width: int = 576, layers: int = 8) -> Any:
    """An untrained Llama for the ids of `tokenizer`, with tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
            pad_token_id=2,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def rows(n: int) -> list[dict[str, Any]]:
    """Bundled prompts as messages for student and teacher."""
    return list(training_rows(load("bundled").examples[:n], PromptSettings()))


def lengths(n: int, *, median: int = 56, sigma: float = 0.5, most: int = 160, seed: int = 0) -> list[int]:
    """Log-normal response lengths, in tokens."""
    g = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(n, generator=g) * sigma).exp() * median
    return drawn.round().clamp(8, most).int().tolist()


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def scratch() -> str:
    return tempfile.mkdtemp(prefix="rgsd-benchmark-")


def tokenized(tokenizer: Any, conversations: Sequence[Any]) -> list[list[int]]:
    return [
        list(tokenizer.apply_chat_template([dict(m) for m in c], add_generation_prompt=True, return_dict=False))
        for c in conversations
    ]
