"""Training: the loss, the teacher, RGSD's trainer, checkpoints, and the GRPO and SFT baselines."""
