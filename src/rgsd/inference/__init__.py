"""Generation for evaluation: conversations -> responses, through transformers, vLLM, or an OpenAI-compatible server.

Greedy by default, as in the paper. Greedy here means the most likely token of the model's own distribution: what a
checkpoint's generation_config.json says about sampling (Qwen's repetition_penalty 1.05, top_k 20, ...) is left aside,
and only its end-of-sequence tokens are kept. Whoever wants other settings sets them in plain sight.

A response depends on the prompt and on the settings, not on which other prompts are asked for or in which order:
sampling is seeded by the seed and the prompt together. So an evaluation that was killed asks for what is missing, and
gets what it would have got; and the same prompt twice gets the same response twice (take another seed for another).
"""

from rgsd.inference.interface import (
    Conversation,
    Done,
    Generator,
    Response,
    ResponseKey,
    decode,
    digest,
    prompt_seed,
    response_keys,
    tokenize,
)
from rgsd.inference.sampling import SamplingConfig
from rgsd.inference.server_backend import ServerGenerator
from rgsd.inference.transformers_backend import (
    TransformersGenerator,
    generate,
    own_generation_config,
    transformers_settings,
)
from rgsd.inference.vllm_backend import VllmGenerator, vllm_settings

__all__ = [
    "Conversation",
    "Done",
    "Generator",
    "Response",
    "ResponseKey",
    "SamplingConfig",
    "ServerGenerator",
    "TransformersGenerator",
    "VllmGenerator",
    "decode",
    "digest",
    "generate",
    "own_generation_config",
    "prompt_seed",
    "response_keys",
    "tokenize",
    "transformers_settings",
    "vllm_settings",
]
