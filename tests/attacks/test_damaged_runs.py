"""A finished run folder, damaged in every way that a disk, a text editor or a stranger can: `rgsd report` ends in an
error of ours that names the file, or in a page that says what is missing; never in a traceback or a number that is not.
"""

import json

import pytest
import yaml

from rgsd.errors import RGSDError
from rgsd.report import read, report_page
from rgsd.report.page import as_json
from rgsd.runs import create_run, open_run

N_PROMPTS = 3
DEEP = "[" * 5_000 + "]" * 5_000
HUGE = "9" * 5_000
VERDICT = {"criterion": "Good.", "weight": 1.0, "tags": ["kind"], "met": True, "grade": None, "reason": "r"}


def sample(arm, i):
    return {
        "arm": arm, "example_id": f"e{i}", "domain": "medicine", "tags": [], "scoring": "satisfaction",
        "question": f"question {i}", "response": "a response", "judged_text": "a response", "n_tokens": 10,
        "is_truncated": False, "score": 0.5 + 0.1 * (arm == "trained"), "coverage": 1.0, "judge": "llm",
        "verdicts": [dict(VERDICT)], "replies": ["raw"], "problem": "",
        "usage": {"calls": 1, "cached": 0, "prompt_tokens": 5, "completion_tokens": 5, "seconds": 0.1, "price": 0.01},
    }  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A finished GRPO run with all of its files."""
    made = create_run(tmp_path / "run", {"seed": 0, "num_generations": 2, "per_device_train_batch_size": 2})
    made.append("samples.jsonl", [sample(arm, i) for arm in ("base", "trained") for i in range(N_PROMPTS)])
    steps = [
        {"step": s, "loss": 0.1, "reward": 0.5, "step_time": 1.0, "seconds/update": 0.5, "completions/mean_length": 9.0}
        for s in (1, 2)
    ]
    made.append("metrics.jsonl", steps)
    made.append("rollouts.jsonl", [{"step": s, "reward": 0.5, "usage": {"calls": 1, "price": 0.01}} for s in (1, 2)])
    made.append("responses.jsonl", [{"arm": "base", "example_id": "e0", "text": "a response", "n_tokens": 10}])
    made.append("explanations.jsonl", [{"example_id": "e0", "policy": "base", "tokens": [{"t": "a", "d": 0.1}]}])
    made.write("results.json", {"baseline": "base", "arms": [], "differences": {}, "advice": []})
    made.note(status="finished", seconds=3.0, rollouts_per_step=2)
    return made


FILES = (
    "run.json", "config.yaml", "results.json", "samples.jsonl", "metrics.jsonl", "rollouts.jsonl", "responses.jsonl",
    "explanations.jsonl",
)  # fmt: skip
WHOLE = {
    "empty": b"",
    "a null byte": b"\x00",
    "null bytes": b"\x00" * 4096 + b"\n",
    "not UTF-8": b"\xff\xfe\x80\n",
    "not JSON": b"{oops\n",
    "a number": b"7\n",
    "a text": b'"text"\n',
    "a list": b"[1, 2]\n",
    "null": b"null\n",
    "NaN": b"NaN\n",
    "a huge number": HUGE.encode() + b"\n",
    "deep nesting": DEEP.encode() + b"\n",
    "a deep field": b'{"a": ' + DEEP.encode() + b"}\n",
}
WRONG = {
    "text": '"x"', "list": "[1]", "object": '{"a": 1}', "true": "true", "NaN": "NaN", "infinity": "-Infinity",
    "huge float": "1e308", "beyond floats": "1e999", "huge whole": HUGE, "negative": "-1e300",
}  # fmt: skip
# File, field, and damages that leave it as sound as before.
FIELDS = [
    ("run.json", "seconds", ()),
    ("run.json", "rollouts_per_step", ()),
    ("run.json", "versions", ("object",)),
    ("config.yaml", "seed", ()),
    ("results.json", "baseline", ()),
    ("results.json", "advice", ()),
    ("samples.jsonl", "arm", ("text",)),
    ("samples.jsonl", "example_id", ("text",)),
    ("samples.jsonl", "score", ()),
    ("samples.jsonl", "scoring", ()),
    ("samples.jsonl", "verdicts", ()),
    ("samples.jsonl", "n_tokens", ()),
    ("samples.jsonl", "usage", ("object",)),
    ("samples.jsonl", "judged_text", ("text",)),
    ("metrics.jsonl", "step", ()),
    ("metrics.jsonl", "loss", ()),
    ("metrics.jsonl", "seconds/update", ()),
    ("metrics.jsonl", "completions/mean_length", ()),
    ("rollouts.jsonl", "usage", ("object",)),
    ("explanations.jsonl", "tokens", ()),
]
CASES = [(f"{name}: {how}", name, lambda old, data=data: data) for name in FILES for how, data in WHOLE.items()]
CASES += [(f"{name}: cut in half", name, lambda old: old[: len(old) // 2]) for name in FILES]
CASES += [
    (f"{name}: {field} is {how}", name, lambda old, field=field, name=name, value=value: put(old, name, field, value))
    for name, field, sound in FIELDS
    for how, value in WRONG.items()
    if how not in sound
]
CASES += [
    (f"{name}: no {field}", name, lambda old, field=field, name=name: put(old, name, field, None))
    for name, field, _ in FIELDS
]


def put(old, name, field, value):
    """Set one field of the file's first row to some JSON, or remove it."""
    if name == "config.yaml":
        settings = yaml.safe_load(old)
        settings.pop(field)
        return (yaml.safe_dump(settings) + (f"{field}: {value}\n" if value else "")).encode()
    first, _, rest = old.partition(b"\n") if name.endswith("l") else (old, b"", b"")
    row = json.loads(first)
    row.pop(field)
    text = json.dumps(row)
    if value is not None:
        text = text[:-1] + f', "{field}": {value}}}'
    return text.encode() + b"\n" + rest


def test_a_sound_run_has_a_page_without_a_problem(run):
    found = read([str(run.folder)])
    assert found.runs[0].problems == []
    assert [a.score["mean"] for a in found.runs[0].arms] == pytest.approx([0.5, 0.6])
    assert found.runs[0].cost.rollouts == 2
    assert "</html>" in report_page(found)


@pytest.mark.parametrize(("name", "damage"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_a_damaged_run_is_refused_by_name_or_has_a_page(run, name, damage):
    path = run.folder / name
    path.write_bytes(damage(path.read_bytes()))
    said = ""
    try:
        facts = read([str(run.folder)])
        html = report_page(facts)
    except RGSDError as error:
        said = str(error)
    if said:
        assert str(run.folder) in said
        assert name in said or name in ("run.json", "config.yaml")
        return
    # No number on the page is none: neither NaN nor an infinity is valid in strict JSON.
    json.dumps(as_json(facts), allow_nan=False)
    assert html.rstrip().endswith("</html>")


def test_there_are_as_many_damages_as_the_attack_tried():
    assert len(CASES) >= 130


def test_a_bad_line_of_samples_is_named_by_file_and_line(run):
    path = run.folder / "samples.jsonl"
    lines = path.read_text().splitlines()
    lines[3] = lines[3].replace('"score": 0.6', '"score": NaN')
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(RGSDError, match=r"samples\.jsonl, line 4: .*NaN"):
        read([str(run.folder)])


@pytest.mark.parametrize(
    ("name", "value"),
    [("chat_template_kwargs", [1]), ("beta", "x"), ("clip_threshold", [1]), ("loss_temperature", float("nan")),
     ("think_open_tag", 5), ("think_close_tag", ["a"]), ("mask_thinking", "x"), ("max_completion_length", -1),
     ("model_name_or_path", ["a"]), ("model_revision", 5), ("dtype", 5), ("held_out", "x"), ("data", {"a": 1}),
     ("template", 5), ("criteria_tags", "x"), ("trust_remote_code", "yes"), ("show_weights", 1)],
)  # fmt: skip
def test_a_setting_of_another_type_is_named(run, name, value):
    path = run.folder / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {name: value}))
    with pytest.raises(RGSDError, match=f"config.yaml: {name} must be"):
        open_run(run.folder)


def test_a_last_line_half_written_is_dropped_with_a_notice(run, capsys):
    path = run.folder / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    facts = read([str(run.folder)]).runs[0]
    assert "samples.jsonl: skipped line 6" in " ".join(capsys.readouterr().out.split())
    assert [len(a.samples) for a in facts.arms] == [N_PROMPTS, N_PROMPTS - 1]


@pytest.mark.parametrize("name", ["metrics.jsonl", "explanations.jsonl", "rollouts.jsonl"])
def test_a_bad_line_elsewhere_is_named_too(run, name):
    path = run.folder / name
    path.write_bytes(b"{oops\n" + path.read_bytes())
    with pytest.raises(RGSDError, match=f"{name}, line 1"):
        read([str(run.folder)])
