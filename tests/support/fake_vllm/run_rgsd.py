"""Runs `rgsd`; TRL's client, which asks for a CUDA device in one place, is told that there is one."""

import sys

from trl.generation.vllm_client import VLLMClient

original = VLLMClient.init_communicator
VLLMClient.init_communicator = lambda self, device=0: original(self, device="cuda")

from rgsd.cli import main  # noqa: E402 - only after the line above is in place

sys.exit(main(sys.argv[1:]))
