"""Generation for evaluation: conversations to responses, with transformers, vLLM, or an OpenAI-compatible server.

Greedy by default, as in the paper: the most likely token of the model's own distribution. Sampling options in a
checkpoint's generation_config.json (Qwen's repetition_penalty 1.05, top_k 20, ...) are ignored, except for its
end-of-sequence tokens. To use other options, set them explicitly.

A response depends on its prompt and the settings, and not on the other prompts or their order: the random numbers of
each response come from the seed and the prompt. A killed evaluation therefore continues with exactly the missing
responses, and the same prompt gets the same response. For a different one, change the seed.
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
