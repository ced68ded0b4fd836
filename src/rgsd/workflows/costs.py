"""Estimates of what training takes: memory per device, and tokens, FLOPs, bytes, hours and dollars per run.

Every assumed number is a field of `Hardware` or `Work`, so docs/SCALE.md can list it. A test compares the memory
formula with a measured run.
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
        """Parameters of one layer: attention, gated MLP, two norms."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding and, unless tied to it, the head."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return self.layers * self.layer_parameters + self.embedding_parameters + self.hidden

    def lora_parameters(self, rank: int) -> int:
        """Parameters of a LoRA adapter on all linear layers."""
        h, a, kv, i = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim, self.intermediate
        return self.layers * rank * ((h + a) * 2 + (h + kv) * 2 + (h + i) * 3)

    def kv_bytes(self, width: int = 2) -> int:
        """Bytes per token of the key-value cache, with `width` bytes per value."""
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
class Layout:
    """How a model is trained, as far as memory depends on it.

    Args:
        engine: How parameters, gradients and optimizer states are spread over the devices.
        devices: Number of devices, one process each.
        lora_rank: Rank of the adapter; None for full training.
        weight_bytes: Bytes per frozen weight.
        trained_bytes: Bytes per trained weight. LoRA weights are float32.
        compute_bytes: Bytes per activation.
        rows: Rows per micro-batch and device.
        rollout_rows: Responses sampled at once on a device.
        prompt: Tokens of the longest student prompt.
        teacher_prompt: Tokens of the longest teacher prompt.
        response: Tokens of the longest response.
        checkpointing: Whether the backward pass recomputes activations.
        teacher_copy: Whether the teacher holds a copy of the trained parameters (full training, or ema).
        teacher_passes: Teacher passes whose hidden states a step keeps: 2 with a contrastive teacher.
        loss_chunk_tokens: Tokens whose logits exist at once.
        vllm_share: Share of the device's memory that a colocated vLLM takes; 0 without one.
        samples_here: Whether transformers samples on this device, without vLLM.
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
    teacher_passes: int = 1
    loss_chunk_tokens: int | None = None
    vllm_share: float = 0.0
    samples_here: bool = True


LIVE_LOGITS = 6
"""Float32 matrices of size chunk tokens x vocabulary that the loss holds at its peak."""
CHUNK_BYTES = 16 * 1024**2
RUNTIME_BYTES = GIB
"""CUDA context, communication buffers and workspaces. An assumption, not a count."""


def memory(model: Architecture, layout: Layout, device_bytes: float = 80e9) -> dict[str, float]:
    """Bytes per device at the peak of a step, by part.

    Sampling, the teacher's forward pass and the backward pass never run at the same time, so only the largest of them
    counts.
    """
    share = 1 / layout.devices
    trained = model.parameters if layout.lora_rank is None else model.lora_parameters(layout.lora_rank)
    frozen = 0 if layout.lora_rank is None else model.parameters
    is_sharded = layout.engine in ("fsdp2", "zero3")
    of_weights = share if is_sharded else 1.0
    of_states = share if layout.engine != "ddp" else 1.0
    largest = max(model.layer_parameters, model.vocabulary * model.hidden)
    parts = {
        "weights": (frozen * layout.weight_bytes + trained * layout.trained_bytes) * of_weights,
        "gathered weights": 2 * largest * layout.compute_bytes if is_sharded else 0.0,
        "gradients": trained * layout.trained_bytes * of_states,
        "optimizer": 2 * trained * layout.trained_bytes * of_states,
        "teacher's copy": trained * layout.trained_bytes * of_weights if layout.teacher_copy else 0.0,
    }
    chunk = layout.loss_chunk_tokens or max(1, CHUNK_BYTES // (4 * model.vocabulary))
    parts["loss"] = LIVE_LOGITS * chunk * model.vocabulary * 4 + (
        # The loss accumulates the head's gradient in float32, apart from the parameter's own gradient.
        model.vocabulary * model.hidden * 4 if layout.lora_rank is None else 0
    )
    states = layout.rollout_rows * layout.response * model.hidden * layout.compute_bytes
    parts["teacher's states"] = layout.teacher_passes * states
    tokens = layout.rows * (layout.prompt + layout.response)
    layer = tokens * _layer_activations(model) * layout.compute_bytes
    kept = model.layers * tokens * model.hidden * layout.compute_bytes
    teacher = layout.rows * (layout.teacher_prompt + layout.response) * _layer_activations(model) * layout.compute_bytes
    backward = kept + layer if layout.checkpointing else model.layers * layer
    cache = layout.rollout_rows * (layout.prompt + layout.response) * model.kv_bytes(layout.compute_bytes)
    parts["activations or cache"] = max(backward, teacher, cache if layout.samples_here else 0.0)
    parts["vLLM"] = layout.vllm_share * device_bytes
    parts["runtime"] = RUNTIME_BYTES
    return {name: float(value) for name, value in parts.items()}


def _layer_activations(model: Architecture) -> int:
    """Values per token that one layer keeps for its backward pass: the inputs of each product and of the norms."""
    attention = model.head_dim * (2 * model.heads + 2 * model.kv_heads)
    return attention + 3 * model.intermediate + 6 * model.hidden


# --- Tokens, FLOPs, hours and dollars -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """The work of one epoch. Lengths are mean numbers of tokens.

    Args:
        prompts: Prompts in the data set.
        batch: Prompts per step, over all devices.
        prompt: Tokens of a prompt.
        rubric: Tokens of a rubric.
        response: Tokens of a response.
        longest: Length of a step's longest response relative to the mean. The step waits for that response.
        generations: GRPO's responses per prompt. RGSD samples one.
        judge_input: Tokens of the judge's instructions in one call, which covers all criteria.
        judged: Tokens of the judged response, without its reasoning.
        judge_output: Tokens of the judge's verdicts.
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
    """Assumptions about a device (an H100 SXM) and about prices.

    Args:
        flops: Peak bf16 FLOPs per second.
        bandwidth: Peak bytes per second from memory.
        training_use: Share of the peak FLOPs that training reaches.
        decoding_use: Share of both peaks that decoding reaches.
        link: Bytes per second between devices.
        dollars_an_hour: Price of a device.
        judge_dollars: Prices of a million input tokens and of a million output tokens.
        judge_seconds: Seconds per judge call.
        judge_calls_at_once: Concurrent judge calls.
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
    """Cost of one epoch: tokens, FLOPs, bytes moved, seconds of each phase, hours and dollars.

    Training is LoRA with checkpointed activations, so each parameter and token costs 2 FLOPs in the forward pass, 2 in
    the recomputed one and 2 for the gradient of the activations. Each device decodes its share of a step's responses
    as one batch; a token takes as long as its arithmetic or as reading weights and cache, whichever is longer.
    Rollout, judging and training follow one another, as in TRL.
    """
    p, steps = model.parameters, work.prompts / work.batch
    generations = work.generations if method == "grpo" else 1
    responses = work.prompts * generations
    sampled = responses * work.response
    trained = responses * (work.prompt + work.response)
    # RGSD's extra forward pass is the teacher's. GRPO's recomputes the sampled tokens' probabilities.
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
    # Once per step, each device's vLLM receives all weights, and the devices all-reduce the adapter's gradients.
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
    """The work of the paper's run of a model on a domain. Thinking models write longer responses."""
    work = Work(prompts=PAPERS_DATA[domain])
    return replace(work, **{**({"response": 2500} if "Thinking" in model else {}), **changes})


__all__ = [
    "PAPERS_DATA",
    "PAPERS_MODELS",
    "Architecture",
    "Hardware",
    "Layout",
    "Work",
    "memory",
    "run_cost",
    "work_of",
]
