"""Evaluation: responses and verdicts to scores with intervals; gap, comparison, audits."""
