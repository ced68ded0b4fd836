import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import tiny_model
from support.openai_server import OpenAIServer, asked_ids
from support.samples import sample

from rgsd.errors import BudgetExhausted, ConfigError
from rgsd.evaluation.arms import evaluate_arm, judge_responses
from rgsd.evaluation.responses import references
from rgsd.evaluation.statistics import interval
from rgsd.evaluation.summaries import met_by_tag, paired_difference, results, summarise, usage_totals
from rgsd.inference import Response, SamplingConfig, generate, response_keys
from rgsd.judges import ChecksJudge, JudgeConfig, build_judge
from rgsd.runs import RESPONSES, SAMPLES, create_run


def test_greedy_responses_come_back_in_the_prompts_order_whatever_the_batch(tokenizer):
    model = tiny_model(tokenizer)
    prompts = [[{"role": "user", "content": "water " * n}] for n in (9, 1, 5, 3)]
    one = generate(model, tokenizer, prompts, SamplingConfig(8), batch_size=1)
    many = generate(model, tokenizer, prompts, SamplingConfig(8), batch_size=4)
    assert [r.text for r in one] == [r.text for r in many]
    ids = tokenizer.apply_chat_template(prompts[2], add_generation_prompt=True, return_dict=False)
    with torch.no_grad():
        first = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
    assert many[2].text.startswith(tokenizer.decode([first], skip_special_tokens=True))
    assert all(r.n_tokens <= 8 for r in many)


def test_rows_carry_every_verdict_and_its_score(examples):
    responses = [Response("Rest, and drink tea.", 5, False)] * 2
    rows = judge_responses(examples[:2], responses, ChecksJudge(), arm="base")
    assert rows[0].score == pytest.approx((5 - 3) / 5)
    assert [v.met for v in rows[0].verdicts] == [True, True]
    assert rows[0].coverage == 1.0
    assert rows[0].judge == "checks"


def test_reasoning_is_not_judged(examples):
    rows = judge_responses(examples[:1], [Response("<think>rest</think>Walk.", 9, False)], ChecksJudge(), arm="a")
    assert rows[0].score == 0.0
    never_left = Response("rest and more rest", 9, True, starts_in_thinking=True)
    assert judge_responses(examples[:1], [never_left], ChecksJudge(), arm="a")[0].score == 0.0


def test_the_interval_covers_at_its_rate():
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        found = interval(rng.normal(0.4, 0.2, size=60).tolist(), seed=seed)
        covered += found.low <= 0.4 <= found.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_interval_is_seeded_and_clips_where_the_authors_do():
    values = [-0.9, -0.5, 0.1]
    assert interval(values, seed=3) == interval(values, seed=3)
    assert interval(values, scoring="healthbench").mean == 0.0
    assert interval(values).mean == pytest.approx(sum(values) / 3)


def test_the_difference_is_paired():
    a = [sample(str(i), i / 10) for i in range(10)]
    b = [*(sample(str(i), i / 10 + 0.05) for i in reversed(range(10))), sample("0x", None)]
    found = paired_difference(a, b)
    assert found.mean == pytest.approx(0.05)
    assert found.high - found.low < 1e-9
    assert found.n == 10


def test_summaries(examples):
    rows = judge_responses(
        examples, [Response("Rest." if i % 2 else "Tea.", 3, i == 0) for i in range(8)], ChecksJudge(), arm="x"
    )
    summary = summarise(rows)
    assert summary["n_prompts"] == 8
    assert summary["truncated_share"] == 1 / 8
    assert summary["score"]["low"] <= summary["score"]["mean"] <= summary["score"]["high"]
    assert met_by_tag(rows) == {}


class _Thinks:
    """A base model that thinks before it answers, the second time without end."""

    name = "thinks"

    def __init__(self, *texts):
        self.texts = texts

    def keys(self, prompts):
        return response_keys("w", {}, prompts)

    def generate(self, prompts, done=None):
        for i, text in zip(range(len(prompts)), self.texts, strict=False):
            done(i, Response(text, 9, "</think>" not in text))


def test_self_written_references_are_without_reasoning(tmp_path, examples):
    run = create_run(tmp_path / "run", {})
    written = references(run, examples[:1], _Thinks("<think>rubric</think>\nRest."))
    assert written == {"e0": "Rest."}
    assert references(run, examples[:1], _Thinks()) == written  # taken from the run
    with pytest.raises(ConfigError, match=r"1 of 2 references .*1 of them were cut off"):
        references(run, examples[:2], _Thinks("<think>without end"))


def test_the_table_counts_requests_that_are_in_no_sample(examples, tmp_path):
    """A process that dies between a reply and its sample has paid for the reply."""

    def met(request):
        return json.dumps({"verdicts": [{"id": i, "reason": "so", "met": True} for i in asked_ids(request)]})

    run = create_run(tmp_path / "run", {})
    run.append(
        RESPONSES, [{"arm": "base", "example_id": e.id, **asdict(Response("Rest.", 2, False))} for e in examples]
    )
    with OpenAIServer(met, script=["500", None, "503"]) as server:
        settings = {"judge_api_base": server.url, "judge_cache": "off", "judge_retry_max_wait": 0.01}

        def evaluated(judge):
            prompts = [list(e.messages) for e in examples]
            return evaluate_arm(run, "base", examples, prompts, None, judge)

        config = JudgeConfig(judge="m", judge_max_calls=len(examples) - 2, **settings)
        with pytest.raises(BudgetExhausted):
            evaluated(build_judge(config))
        run.set_aside(SAMPLES, lambda row: row["example_id"] == examples[0].id)
        judge = build_judge(JudgeConfig(judge="m", **settings))
        samples = evaluated(judge)
        n_sent = len(server.records())
    table = results({"base": samples}, run, 0, judge=judge.name)
    assert usage_totals(samples)["calls"] < n_sent
    assert table["arms"][0]["usage"]["calls"] == n_sent
