"""Benchmarks of time and memory: `python -m benchmarks [NAME ...] [--quick]` writes results.json.

    p1_step        one full step against TRL's SDFTTrainer and a naive loop
    p2_update      the update phase, and the divergence, against their matrix products
    p3_memory      peak memory of the divergence against full logits
    p4_grpo        time per prompt of RGSD against GRPO with 16 rollouts and programmatic checks
    p5_padding     share of padding at log-normal lengths
    p6_rollouts    the decode loop against transformers' `generate`
    growth         step time and memory by prompts, response, rubric, vocabulary and model size

Compared programs run in one process, alternately. Results are medians, and ratios of medians.
"""
