"""What rgsd costs, against what: `python -m benchmarks [NAME ...] [--quick]`, written to results.json.

    p1_step        one whole step against TRL's SDFTTrainer and a naive loop
    p2_update      the update phase, and the divergence, against their bare matrix products
    p3_memory      peak memory of the divergence against full logits
    p4_grpo        a prompt's cost under RGSD against judge-GRPO with 16 rollouts
    p5_padding     padded tokens at a log-normal spread of lengths
    p6_rollouts    the decode loop against transformers' `generate`
    growth         step time and memory over prompts, response, rubric, vocabulary, model size

Whatever is compared runs in one process, alternately, and what is reported are medians and the ratio of medians.
"""
