"""Evaluation: responses and verdicts become scores with intervals, comparisons and audits.

In reading order: `samples` (one judged response, and samples.jsonl), `run_ref` (names of runs, arms and models),
`responses` and `arms` (generate, judge, store), `policies`, `config` and `evaluate` (`rgsd eval`), `statistics`
(intervals and tests), `conclusions` (verdicts in words), `summaries` (the table of a run); then `gap`, `compare`,
`agreement` (judges against people) and `audits`.
"""
