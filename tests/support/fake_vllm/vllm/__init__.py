"""The parts of vLLM that TRL's client imports: the trainer's end of the protocol, over a store instead of NCCL."""

__version__ = "0.30.0"


class LLM: ...


class RequestOutput: ...


class SamplingParams: ...
