"""What training takes: memory a device, and tokens, FLOPs, bytes, hours and dollars a run. Arithmetic alone.

Every number that is assumed and not counted is a field of `Hardware` or `Work`, so that docs/SCALE.md can name it. The
memory formula is held to a measured run by tests/test_dry_run.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Engine = Literal["ddp", "fsdp2", "zero2", "zero3"]
GIB = 1024**3
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


@dataclass(frozen=True)
class Architecture:
    """A dense decoder's shape."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Any) -> Architecture:
        """The shape that a transformers configuration describes."""
        c = config.get_text_config()
        heads = c.num_attention_heads
        return cls(
            layers=c.num_hidden_layers,
            hidden=c.hidden_size,
            intermediate=c.intermediate_size,
            heads=heads,
            kv_heads=getattr(c, "num_key_value_heads", None) or heads,
            head_dim=getattr(c, "head_dim", None) or c.hidden_size // heads,
            vocabulary=c.vocab_size,
            tied=bool(getattr(config, "tie_word_embeddings", False)),
        )

    @property
    def layer_parameters(self) -> int:
        """Of one layer: attention, gated MLP, two norms."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding and, where it is not the same, the head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.layer_parameters + self.embedding_parameters + self.hidden

    def lora_parameters(self, rank: int) -> int:
        """Of an adapter on all linear layers."""
        h, a, kv, i = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate
        return self.layers * rank * ((h + a) * 2 + (h + kv) * 2 + (h + i) * 3)

    def kv_bytes(self, width: int = 2) -> int:
        """Of the cache, a token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width


# From the models' published config.json.
QWEN25_3B = Architecture(36, 2048, 11008, 16, 2, 128, 151_936, tied=True)
QWEN25_7B = Architecture(28, 3584, 18944, 28, 4, 128, 152_064, tied=False)
QWEN3_4B = Architecture(36, 2560, 9728, 32, 8, 128, 151_936, tied=True)
QWEN3_8B = Architecture(36, 4096, 12288, 32, 8, 128, 151_936, tied=False)
PAPERS_MODELS = {
    "Qwen2.5-3B-Instruct": QWEN25_3B,
    "Qwen2.5-7B-Instruct": QWEN25_7B,
    "Qwen3-4B-Thinking": QWEN3_4B,
    "Qwen3-8B-Thinking": QWEN3_8B,
}
PAPERS_DATA = {"medical": 12_519, "science": 19_806}


# --- Memory -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How a model is to be trained.

    Args:
        engine, devices: what joins how many processes.
        lora_rank: None for full training.
        weight_bytes: a frozen weight; a trained one has `trained_bytes` (LoRA's are fp32).
        compute_bytes: an activation.
        rows: micro-batch a device; rollout_rows: responses sampled at once on a device.
        prompt, teacher_prompt, response: tokens, the longest that are expected.
        checkpointing: activations recomputed in backward.
        teacher_copy: whether the teacher is a copy of the trained parameters (full training, ema).
        loss_chunk_tokens: tokens whose logits are held at once.
        vllm_share: of the device's memory that a colocated vLLM takes; 0 otherwise.
        samples_here: whether transformers samples on this device (no vLLM).
    """

    engine: Engine = "ddp"
    devices: int = 1
    lora_rank: int | None = None
    weight_bytes: int = 2
    trained_bytes: int = 4
    compute_bytes: int = 2
    rows: int = 4
    rollout_rows: int = 32
    prompt: int = 512
    teacher_prompt: int = 2048
    response: int = 1024
    checkpointing: bool = True
    teacher_copy: bool = False
    loss_chunk_tokens: int | None = None
    vllm_share: float = 0.0
    samples_here: bool = True


LIVE_LOGITS = 6
"""fp32 matrices of a chunk's tokens by the vocabulary that the loss holds at its peak."""
CHUNK_BYTES = 16 * 1024**2
RUNTIME_BYTES = GIB
"""CUDA context, communication buffers and workspaces: a round number, not a count."""


def memory(model: Architecture, plan: Plan, device_bytes: float = 80e9) -> dict[str, float]:
    """Bytes a device, part by part, at the step's peak. Sums of parts that do not peak together are not taken: sampling
    and the backward pass share the room that each of them needs, and the larger counts."""
    share = 1 / plan.devices
    trained = model.parameters if plan.lora_rank is None else model.lora_parameters(plan.lora_rank)
    frozen = 0 if plan.lora_rank is None else model.parameters
    is_sharded = plan.engine in ("fsdp2", "zero3")
    of_weights = share if is_sharded else 1.0
    of_states = share if plan.engine != "ddp" else 1.0
    largest = max(model.layer_parameters, model.vocabulary * model.hidden)
    parts = {
        "weights": (frozen * plan.weight_bytes + trained * plan.trained_bytes) * of_weights,
        "gathered weights": 2 * largest * plan.compute_bytes if is_sharded else 0.0,
        "gradients": trained * plan.trained_bytes * of_states,
        "optimizer": 2 * trained * plan.trained_bytes * of_states,
        "teacher's copy": trained * plan.trained_bytes * of_weights if plan.teacher_copy else 0.0,
    }
    chunk = plan.loss_chunk_tokens or max(1, CHUNK_BYTES // (4 * model.vocabulary))
    parts["loss"] = LIVE_LOGITS * chunk * model.vocabulary * 4 + (
        # The head's gradient is summed in fp32 beside the parameter's own.
        model.vocabulary * model.hidden * 4 if plan.lora_rank is None else 0
    )
    parts["teacher's states"] = plan.rollout_rows * plan.response * model.hidden * plan.compute_bytes
    tokens = plan.rows * (plan.prompt + plan.response)
    layer = tokens * _layer_activations(model) * plan.compute_bytes
    kept = model.layers * tokens * model.hidden * plan.compute_bytes
    teacher = plan.rows * (plan.teacher_prompt + plan.response) * _layer_activations(model) * plan.compute_bytes
    backward = kept + layer if plan.checkpointing else model.layers * layer
    cache = plan.rollout_rows * (plan.prompt + plan.response) * model.kv_bytes(plan.compute_bytes)
    parts["activations or cache"] = max(backward, teacher, cache if plan.samples_here else 0.0)
    parts["vLLM"] = plan.vllm_share * device_bytes
    parts["runtime"] = RUNTIME_BYTES
    return {name: float(value) for name, value in parts.items()}


def _layer_activations(model: Architecture) -> int:
    """Values a token that one layer's backward needs: what enters each product, and the norms."""
    attention = model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    return attention + 3 * model.intermediate + 6 * model.hidden


# --- Tokens, FLOPs, hours and dollars -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """What is done a prompt. Lengths are means in tokens.

    Args:
        prompts: of the data set; batch: prompts a step, over all devices.
        prompt, rubric, response: tokens.
        generations: responses a prompt of GRPO; RGSD samples one.
        longest: the longest response of a step over their mean; a step waits for it.
        judge_input, judged, judge_output: tokens of one call for all criteria: instructions, the response without its
            reasoning, verdicts.
    """

    prompts: int = 12_519
    batch: int = 64
    prompt: int = 200
    rubric: int = 700
    response: int = 700
    longest: float = 1.5
    generations: int = 16
    judge_input: int = 400
    judged: int = 700
    judge_output: int = 360


@dataclass(frozen=True)
class Hardware:
    """Assumed of a device and of prices. H100 SXM: 989 TFLOP/s in bf16, 3.35 TB/s.

    Args:
        flops, bandwidth: a second, at their peak; training_use, decoding_use: the share of either that is reached.
        link: bytes a second between devices. dollars_an_hour: a device. judge_dollars: a million tokens in, and out.
        judge_seconds: a call; judge_calls_at_once.
    """

    flops: float = 989e12
    bandwidth: float = 3.35e12
    training_use: float = 0.35
    decoding_use: float = 0.6
    link: float = 200e9
    dollars_an_hour: float = 2.5
    judge_dollars: tuple[float, float] = (1.25, 10.0)
    judge_seconds: float = 6.0
    judge_calls_at_once: int = 64


def run_cost(
    model: Architecture, work: Work, hardware: Hardware, devices: int, *, method: Literal["rgsd", "grpo"]
) -> dict[str, float]:
    """Of one epoch: tokens, FLOPs, bytes moved, seconds of each phase, hours and dollars.

    Training is LoRA with checkpointed activations: forward 2, recomputed forward 2, gradient of activations 2 FLOPs a
    parameter and token. A device decodes its share of a step's responses at once; each token takes the longer of its
    arithmetic and of reading weights and cache. Rollout, judge, and training follow one another, as in TRL.
    """
    p, steps = model.parameters, work.prompts / work.batch
    generations = work.generations if method == "grpo" else 1
    responses = work.prompts * generations
    sampled = responses * work.response
    trained = responses * (work.prompt + work.response)
    # GRPO's extra forward pass: the sampled tokens' probabilities under the student that an engine sampled from.
    scored = responses * (work.prompt + work.rubric + work.response) if method == "rgsd" else trained
    flops_decode = 2.0 * p * (sampled + work.prompts * work.prompt)
    flops_train = 6.0 * p * trained
    flops_score = 2.0 * p * scored
    at_once = work.batch * generations / devices
    width = max(1.0, at_once)
    context = work.prompt + work.response / 2
    arithmetic = 2.0 * p * width / (hardware.flops * hardware.decoding_use)
    reading = (2.0 * p + width * context * model.kv_bytes()) / (hardware.bandwidth * hardware.decoding_use)
    seconds_rollout = steps * work.response * work.longest * max(arithmetic, reading)
    busy = min(devices, work.batch * generations)
    seconds_train = (flops_train + flops_score) / (busy * hardware.flops * hardware.training_use)
    # To each device's vLLM the whole weights, once a step; between devices the adapter's gradients, all-reduced.
    reduced = 2 * 4.0 * model.lora_parameters(32) * (devices - 1) / devices
    moved = steps * devices * (2.0 * p + reduced)
    seconds_moved = steps * (2.0 * p + reduced) / hardware.link
    calls = responses if method == "grpo" else 0
    judge_in = calls * (work.judge_input + work.rubric + work.prompt + work.judged)
    judge_out = calls * work.judge_output
    waves = -(-work.batch * generations // hardware.judge_calls_at_once) if calls else 0
    seconds_judge = steps * waves * hardware.judge_seconds
    seconds = seconds_rollout + seconds_train + seconds_moved + seconds_judge
    dollars_devices = seconds / 3600 * devices * hardware.dollars_an_hour
    dollars_judge = (judge_in * hardware.judge_dollars[0] + judge_out * hardware.judge_dollars[1]) / 1e6
    return {
        "steps": steps,
        "tokens sampled": sampled,
        "tokens read": trained + scored,
        "FLOPs": flops_decode + flops_train + flops_score,
        "bytes moved": moved,
        "judge calls": calls,
        "judge tokens": judge_in + judge_out,
        "seconds rollout": seconds_rollout,
        "seconds judge": seconds_judge,
        "seconds training": seconds_train,
        "seconds moved": seconds_moved,
        "hours": seconds / 3600,
        "dollars devices": dollars_devices,
        "dollars judge": dollars_judge,
        "dollars": dollars_devices + dollars_judge,
    }


def work_of(model: str, domain: str, **changes: Any) -> Work:
    """The paper's run of a model on a domain; thinking models write longer responses."""
    work = Work(prompts=PAPERS_DATA[domain])
    return replace(work, **{**({"response": 2500} if "Thinking" in model else {}), **changes})


__all__ = ["PAPERS_DATA", "PAPERS_MODELS", "Architecture", "Hardware", "Plan", "Work", "memory", "run_cost", "work_of"]
