"""The audits: false claims and overclaims with a scripted judge over HTTP, and lengths against hand-computed values."""

import json

import pytest
from support.openai_server import OpenAIServer, asked_ids
from support.samples import sample

from rgsd.cli import main
from rgsd.errors import ConfigError, RunError
from rgsd.evaluation.audits import AuditConfig, Claims, audit, false_claim_rate, length_inflation, overclaim
from rgsd.inference import Response
from rgsd.judges import JudgeConfig
from rgsd.runs import create_run


def answer(request):
    """Finds two claims per response, the second false. Lenient, it grants every criterion; strict, none."""
    system, user = (m["content"] for m in request["messages"])
    if "list the factual claims" in system:
        code = user.split("[response ")[1].split("]")[0]
        claims = [] if "Nothing." in user else ["Water is wet.", "Tea cures all."]
        return json.dumps({"id": code, "claims": claims})
    ids = asked_ids(request)
    if "whether claims are true" in system:
        decided = zip(ids, ("true", "false"), strict=True)
        return json.dumps({"verdicts": [{"id": i, "reason": "", "verdict": v} for i, v in decided]})
    lenient = "a hint, a part or an implication is enough" in system
    return json.dumps({"verdicts": [{"id": i, "reason": "", "met": lenient} for i in ids]})


@pytest.fixture
def run(tmp_path):
    """A run with two arms of three responses, the second twice as long."""
    rubric = [{"criterion": "Advises rest.", "weight": 5}, {"criterion": "Recommends syrup.", "weight": -2}]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps({"id": f"r{i}", "prompt": f"Cough {i}?", "rubric": rubric}) for i in range(3)))
    made = create_run(tmp_path / "run", {"data": str(data), "schema": None})
    for arm, n in (("base", 10), ("trained", 20)):
        for i, text in enumerate(("Rest.", "Drink tea.", "Nothing.")):
            response = Response(text, n, False)
            kept = {f: getattr(response, f) for f in ("text", "n_tokens", "is_truncated", "starts_in_thinking")}
            made.append("responses.jsonl", [{"arm": arm, "example_id": f"r{i}", **kept}])
            verdicts = [{"criterion": c["criterion"], "weight": c["weight"], "tags": [], "met": None, "grade": None}
                        for c in rubric]  # fmt: skip
            row = {"arm": arm, "example_id": f"r{i}", "question": f"Cough {i}?", "response": text, "judged_text": text}
            row |= {"n_tokens": n, "score": None, "judge": "x", "verdicts": verdicts, "scoring": "satisfaction"}
            made.append("samples.jsonl", [row])
    made.note(status="finished")
    return made


def test_all_audits_of_a_run(run, tmp_path):
    with OpenAIServer(answer) as server:
        config = JudgeConfig(judge="j", judge_api_base=server.url, judge_cache=str(tmp_path / "c.sqlite"))
        found = audit([str(run.folder)], config, AuditConfig())
        asked = len(server.records())
        again = audit([f"{run.folder}:trained"], config, AuditConfig())
        assert len(server.records()) == asked  # nothing is bought twice
    base, trained = (found[f"{run.folder}:{arm}"] for arm in ("base", "trained"))
    assert trained["length_inflation"]["mean"] == 2.0
    assert base["length_inflation"]["mean"] == 1.0
    assert base["false_claim_rate"]["mean"] == 0.5
    assert base["false_claim_rate"]["n"] == 2  # a response without claims has no share of false ones
    assert base["claims_per_response"] == pytest.approx(4 / 3)
    assert base["overclaim"]["mean"] == 1.0
    assert base["overclaim_coverage"] == 1.0
    assert again[f"{run.folder}:trained"]["false_claim_rate"] == trained["false_claim_rate"]
    kept = json.loads((run.folder / "audit.json").read_text())
    assert kept["base"]["judge"] == "j"
    assert kept["base"]["claims"]["r2"] == {"claims": [], "verdicts": []}


def test_a_judge_that_declines_leaves_its_responses_out(run, tmp_path):
    with OpenAIServer(lambda request: "I'm sorry, but I can't help with that.") as server:
        config = JudgeConfig(judge="j", judge_api_base=server.url, judge_cache="off", judge_reasks=0)
        found = audit([f"{run.folder}:base"], config, AuditConfig(audits=["claims"]))
    (result,) = found.values()
    assert result["false_claim_rate"] is None
    assert result["coverage"] == 0.0


@pytest.mark.parametrize(
    ("which", "words", "what"),
    [("claims", "false claims unknown", "claims 0 %"), ("overclaim", "overclaims unknown", "overclaims 0 %")],
)
def test_an_audit_without_a_usable_reply_fails_and_says_so(run, capsys, which, words, what):
    with OpenAIServer(lambda request: "I'm sorry, but I can't help with that.") as server:
        argv = ["audit", f"{run.folder}:base", "--audits", which, "--judge", "j", "--judge_api_base", server.url]
        assert main([*argv, "--judge_cache", "off", "--judge_reasks", "0"]) == 1
        told = capsys.readouterr()
        assert words in told.out
        assert what in told.err
        assert "min_coverage" in told.err
        assert main([*argv, "--judge_cache", "off", "--judge_reasks", "0", "--min_coverage", "0"]) == 0


def test_length_needs_no_judge_and_the_others_do(run, capsys):
    assert main(["audit", str(run.folder), "--audits", "length"]) == 0
    assert "2.00 times the first arm's" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="need an LLM judge"):
        audit([str(run.folder)], JudgeConfig(), AuditConfig())
    with pytest.raises(ConfigError, match="lies"):
        AuditConfig(audits=["lies"])
    with pytest.raises(RunError, match="has no arm 'best'"):
        audit([f"{run.folder}:best"], JudgeConfig(), AuditConfig(audits=["length"]))


def test_unclear_claims_and_missing_replies_are_left_out():
    found = [Claims(("a", "b", "c"), ("true", "unclear", "false")), None, Claims(("a",), ("unclear",))]
    rate = false_claim_rate(found)
    assert rate["false_claim_rate"]["mean"] == 0.5
    assert rate["false_claim_rate"]["n"] == 1
    assert rate["coverage"] == pytest.approx(2 / 3)
    assert rate["unclear_share"] == 0.5


def test_overclaim_counts_positive_criteria_that_both_scored():
    def row(*met):
        weights = (1, 1, 1, -1)
        verdicts = [{"criterion": "c", "weight": w, "met": m} for w, m in zip(weights, met, strict=True)]
        return sample("e", verdicts=verdicts)

    found = overclaim([row(True, True, None, True)], [row(True, False, False, False)])
    assert found["overclaim"]["mean"] == 0.5
    assert found["overclaim_coverage"] == pytest.approx(2 / 3)


def test_length_inflation_is_paired_by_prompt():
    def rows(*lengths):
        return [sample(str(i), n_tokens=n) for i, n in enumerate(lengths)]

    found = length_inflation(rows(20, 30, 999)[:2], rows(10, 15, 1))
    assert (found.mean, found.low, found.high, found.n) == (2.0, 2.0, 2.0, 2)
    assert length_inflation(rows(1), []) is None
