"""The lab: a made-up world with exact rubrics and a nano model that knows it, for experiments in minutes on a CPU.

`world.py` defines the facts, the prompts, their rubrics, and the checks that decide every criterion exactly. `nano.py`
pretrains the nano model, whose weights are in the folder `model`. An arm of the lab (`grid.py`) is a recipe for
`rgsd train`, `rgsd grpo` or `rgsd sft` on prompts of this world. `running.py` runs arms, `measurements.py` reads their
results, and `claims.py` decides claims from them.
"""
