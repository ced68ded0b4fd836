"""Training: the loss, the teacher, the trainer on TRL, checkpoints, and the GRPO and SFT baselines."""
