"""Data, recipes and templates that try to hang, exhaust memory or crash: each ends with an rgsd error, a refused row or
an unscored verdict, within seconds."""

import os
import time
from contextlib import contextmanager, suppress

import pytest

from rgsd.cli import main
from rgsd.cli.parsing import RecipeFile
from rgsd.data import load
from rgsd.errors import CheckUndecided, ConfigError, DataError, RunError, UsageError
from rgsd.judges import ChecksJudge
from rgsd.lab.grid import _read as read_arms
from rgsd.prompts.messages import PromptSettings, teacher_messages
from rgsd.rubrics import Criterion, Example, Rubric, checks
from rgsd.rubrics.checks import holds, validate
from rgsd.runs import open_run

pytestmark = pytest.mark.timeout(60)


@contextmanager
def within(seconds=5.0):
    # Time of this process: a busy machine is no hang.
    begin = time.process_time()
    yield
    assert time.process_time() - begin < seconds


def example(*found):
    turn = {"role": "user", "content": "Hi"}
    return Example("x", (turn,), Rubric(tuple(Criterion(f"c{i}", check=c) for i, c in enumerate(found))))


@pytest.fixture(autouse=True)
def _no_earlier_timeouts():
    checks._TIMEOUTS.clear()


# --- Programmatic checks


HANGING = [
    (r"(a+)+$", "a" * 3000 + "!"),
    (r"(a|aa)+$", "a" * 41 + "!"),
    (r"((a|a)+)+$", "a" * 41 + "!"),
    (r"(\w+\s?)*$", "word " * 20_000 + "!?"),
    (r"(.+)\1+\1$", "a" * 20_000 + "!"),
    (r"(?=(a|aa)+$)", "a" * 5000 + "!"),
]


@pytest.mark.parametrize("body", [lambda p: {"regex": p}, lambda p: {"count": {"of": {"regex": p}, "min": 1}}])
@pytest.mark.parametrize(("pattern", "text"), HANGING, ids=[p for p, _ in HANGING])
def test_a_pattern_without_end_is_unscored_and_costs_its_time_once(pattern, text, body):
    rows = example({"not": body(pattern)}, {"any": ["a*", "word"]})
    validate(body(pattern))
    with within(3):
        judgement = ChecksJudge().judge(rows, text)
    assert [v.met for v in judgement.verdicts] == [None, True]  # under "not", an undecided check is no met one
    assert judgement.problem == "check limit"
    assert "(" in judgement.verdicts[0].reason
    with within(3):  # twenty more responses together
        for _ in range(20):
            assert ChecksJudge().judge(rows, text).verdicts[0].met is None
    assert holds(body(pattern), "aa") == holds(body(pattern), "aa")  # an ordinary text still gets its verdict


def test_the_published_example_of_a_hang_is_decided_at_once():
    with within(2):
        assert holds({"regex": "(a+)+$"}, "a" * 40 + "!") is False


@pytest.mark.parametrize("kind", ["negated", "affirmed"])
@pytest.mark.parametrize(
    "text", ["antibiotics " * 1700, "no " + "antibiotics " * 20_000, "n" * 20_000 + "n't", "never. " * 3000]
)
def test_negation_is_found_in_linear_time(kind, text):
    with within(1):
        found = holds({kind: ["antibiotics"]}, text)
    assert found == ("antibiotics" in text and text.startswith("no ") == (kind == "negated"))


@pytest.mark.parametrize(
    ("sentence", "negated", "affirmed"),
    [
        ("Antibiotics, not rest.", False, True),
        ("Antibiotics do not help, so take no antibiotics.", True, True),
        ("Without rest, antibiotics or antibiotics.", True, False),
        ("Rather than antibiotics, rest.", True, False),
        ("Not that. Antibiotics.", False, True),
        ("Nothing about antibiotics.", False, True),
    ],
)
def test_negation_reaches_to_the_end_of_its_sentence(sentence, negated, affirmed):
    assert holds({"negated": ["antibiotics"]}, sentence) is negated
    assert holds({"affirmed": ["antibiotics"]}, sentence) is affirmed


@pytest.mark.parametrize(
    "check",
    [
        {"regex": "a{4294967290}"},
        {"regex": "(?:ab){300000000}"},
        {"regex": "(?:(?:(?:a{100}){100}){100}){100}"},
        {"count": {"of": {"regex": "(?:a{1000}){1000}"}, "min": 1}},
        {"regex": "(" * 5000 + ")" * 5000},
        {"regex": "a" * 1_000_000},
        {"any": ["a " * 100_000 + "b"]},
        {"any": ["a"] * 100_000},
        {"every": [{"starts": {"any": ["a"]}}] * 5000},
    ],
    ids=lambda c: str(c)[:30],
)
def test_a_check_of_immoderate_size_is_refused(check):
    with within(), pytest.raises(DataError):
        validate(check)


def test_a_check_nested_without_end_is_refused():
    check = {"any": ["a"]}
    for _ in range(500):
        check = {"not": check}
    with within(), pytest.raises(DataError, match="levels"):
        validate(check)


def test_a_huge_response_is_unscored():
    with within(), pytest.raises(CheckUndecided, match="characters"):
        holds({"any": ["a"]}, "b" * (checks.MAX_TEXT_CHARS + 1))


@pytest.mark.parametrize("kind", ["any", "all", "order", "negated", "affirmed"])
def test_a_phrase_that_almost_matches_everywhere_costs_a_second(kind):
    check = {kind: ["a " * 3000 + "b"]}
    validate(check)
    with within(), pytest.raises(CheckUndecided, match="shorten the phrase"):
        holds(check, "a " * 200_000)
    with within():
        assert holds(check, "a " * 20_000) is False
    many = {kind: [f"a {i}" for i in range(999)]}
    with within(), suppress(CheckUndecided):
        assert holds(many, "a " * 100_000) is False


def test_many_slow_parts_share_one_limit():
    check = {"every": [{"not": {"starts": {"any": ["nothing"]}}}] * 150}
    validate(check)
    with within(), pytest.raises(CheckUndecided):
        holds(check, "Some words here. " * 50_000)


@pytest.mark.parametrize(
    ("pattern", "text", "met"),
    [(r"a{e<=1}", "b", False), (r"a{e<=1}", "a{e<=1}", True), (r"[{]x\{1{2}", "{x{11", True), (r"a{,2}b", "aab", True)],
)
def test_braces_mean_what_they_mean_to_the_standard_library(pattern, text, met):
    validate({"regex": pattern})
    assert holds({"regex": pattern}, text) is met


# --- Templates


def rendered(source, tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(source)
    return teacher_messages(example({"any": ["a"]}), PromptSettings(template=str(path)))


NO_TEMPLATES = {
    "double loop": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "double loop that writes nothing": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops in macros": "{% macro a(n) %}{% for i in range(999) %}{% if n %}{{ a(n - 1) }}{% endif %}{% endfor %}"
    "{% endmacro %}{{ a(9) }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "repeated text": "{{ 'x' * 10**10 }}",
    "repeated list": "{{ [1] * 10**10 }}",
    "a power": "{{ 10 ** (10 ** 9) }}",
    "a long number": "{% set n = namespace(x=9) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "doubled text": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "added text": "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubled by macros": "{% macro d(x) %}{{ x }}{{ x }}{% endmacro %}" + "{{ " + "d(" * 60 + "'x'" + ")" * 60 + " }}",
    "nested lists": "{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "nested lists as text": "{% set n = namespace(x=['a']) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% endfor %}{{ n.x|string|length }}",
    "a list that grows": "{% set x = [1] %}{% for i in range(60) %}{% set _ = x.extend(x) %}{% endfor %}",
    "center": "{{ 'x'.center(10 ** 10) }}",
    "center, the filter": "{{ 'x'|center(10 ** 10) }}",
    "indent": "{{ 'x'|indent(10 ** 10, true) }}",
    "batch": "{{ [1]|batch(10 ** 10, 'x')|list }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "format, the filter": "{{ '%10000000000d'|format(1) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "replace": "{{ ('a' * 99999)|replace('a', 'a' * 99999) }}",
    "replace, the method": "{{ ('a' * 99999).replace('a', 'a' * 99999) }}",
    "join": "{{ ([('a' * 99999)] * 99999)|join }}",
    "join, the method": "{{ ''.join(['a' * 99999] * 99999) }}",
    "map": "{{ (['a'] * 99999)|map('center', 99999)|join|length }}",
    "lipsum": "{{ lipsum(n=10 ** 9) }}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "internals": "{{ rubric.__class__.__mro__ }}",
    "another file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", NO_TEMPLATES)
def test_a_template_without_measure_is_an_error(name, tmp_path):
    with within(15), pytest.raises(ConfigError, match=r"own\.jinja"):
        rendered("{{ question }} {{ rubric }}" + NO_TEMPLATES[name], tmp_path)


def test_a_template_may_still_compute(tmp_path):
    source = (
        "{{ question }}{% macro m(c) %}<{{ c.text|upper }}>{% endmacro %}{% for c in criteria %}"
        "{{ loop.index + 1 }}{{ m(c) }}{{ c.weight * 2 }}{{ 'a' ~ 1 ~ c.text }}{{ '-' * 3 }}"
        "{{ c.text.replace('c', 'd') }}{{ [c.text, 'x']|map('upper')|join(', ') }}{{ c.tags|length }}"
        "{{ c.text|indent(2) }}{{ 7 % 4 }}{% endfor %}"
    )
    (turn,) = rendered(source, tmp_path)
    assert turn["content"] == "Hi2<C0>2.0a1c0---d0C0, X0c03"


def test_a_template_is_a_regular_file_of_moderate_size(tmp_path):
    os.mkfifo(tmp_path / "pipe.jinja")
    (tmp_path / "zero.jinja").symlink_to("/dev/zero")
    (tmp_path / "large.jinja").write_text("{{ question }}{{ rubric }}" + " " * 1_000_001)
    for name, said in (("pipe", "regular file"), ("zero", "regular file"), ("large", "1,000,000 are allowed")):
        with within(), pytest.raises(ConfigError, match=said):
            PromptSettings(template=str(tmp_path / f"{name}.jinja"))


# --- YAML and data


def doublings(n, times=10):
    """A mapping of `n` lists, each of which names the last one `times` times."""
    lines = ["v0: &v0 [x, x]"]
    lines += [f"v{i}: &v{i} [{', '.join([f'*v{i - 1}'] * times)}]" for i in range(1, n)]
    return "\n".join(lines) + "\n"


YAML_ATTACKS = {
    "aliases": (doublings(30), "values with its aliases written out"),
    "aliases in merges": ("a: &a {x: 1}\n" + "".join(f"b{i}: &b{i} {{<<: *a}}\n" for i in range(35_000)), "values"),
    "a value that holds itself": ("model_init_kwargs: &a\n  x: *a\n", "holds itself"),
    "deep lists": ("data: " + "[" * 20_000 + "]" * 20_000, "nested deeper"),
    "deep blocks": ("\n".join("  " * i + "a:" for i in range(200)), "nested deeper"),
    "many bytes": ("#" + "x" * 1_000_001, "1,000,000 are allowed"),
    "a date that is none": ("data: 2020-99-99\n", "month"),
    "a number without end": ("seed: " + "1" * 5000, "digits"),
    "an object of Python": ("data: !!python/object/apply:os.system ['false']\n", "python/object"),
    "a null byte": ("data: \0\n", "special characters"),
    "bytes": (b"data: \xff\n", "UTF-8"),
}


@pytest.mark.parametrize("name", YAML_ATTACKS)
def test_yaml_without_measure_is_an_error_of_ours(name, tmp_path, capsys):
    text, said = YAML_ATTACKS[name]
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with within(20), pytest.raises(UsageError, match=said):
        RecipeFile.read(str(path))
    (tmp_path / "run.json").write_text("{}")
    path.rename(tmp_path / "config.yaml")
    with within(20), pytest.raises(RunError, match="cannot be read as a run"):
        open_run(tmp_path)
    with within(20), pytest.raises(ConfigError, match="cannot read arms"):
        read_arms(tmp_path / "config.yaml")


@pytest.mark.parametrize("env", ["[1, 2]", "{'a=b': x}", "{'': x}", "text"])
def test_an_environment_that_is_none_is_an_error_with_its_line(env, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"data: bundled\nenv: {env}\n")
    with pytest.raises(UsageError, match=r"recipe\.yaml:2: env must map"):
        RecipeFile.read(str(tmp_path / "recipe.yaml"))


def test_ordinary_aliases_are_read(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: bundled\na: &a {x: [1, 2]}\nb: *a\nc: {<<: *a, y: 3}\n")
    values = RecipeFile.read(str(tmp_path / "recipe.yaml")).values
    assert (values["b"], values["c"]) == ({"x": [1, 2]}, {"x": [1, 2], "y": 3})


@pytest.mark.parametrize("value", ["nan", "NaN", "inf", "-inf", "1e999", "infinity"])
@pytest.mark.parametrize(
    ("command", "name"),
    [("train", "learning_rate"), ("train", "clip_threshold"), ("train", "held_out"), ("train", "judge_budget"),
     ("train", "logging_steps"), ("grpo", "temperature"), ("sft", "temperature"), ("gap", "beta"),
     ("eval", "top_p"), ("eval", "timeout"), ("explain", "loss_temperature"), ("audit", "min_coverage")],
)  # fmt: skip
def test_no_setting_is_nan_or_infinite(command, name, value, capsys, tmp_path):
    (tmp_path / "recipe.yaml").write_text(f"{name}: {value if value[-1].isdigit() else '.' + value[:4].lower()}\n")
    assert main([command, "x", f"--{name}={value}"]) == 2
    assert f"--{name}" in (said := capsys.readouterr().err)
    assert "finite" in said
    if value in ("nan", "inf", "1e999"):
        assert main([command, "x", "--config", str(tmp_path / "recipe.yaml")]) == 2
        assert "recipe.yaml:1: " in (said := capsys.readouterr().err)
        assert "finite" in said


def test_no_value_inside_a_setting_is_nan(tmp_path, capsys):
    (tmp_path / "recipe.yaml").write_text("data: bundled\nmodel_init_kwargs: {a: [1, .nan]}\n")
    assert main(["train", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert "recipe.yaml:2: model_init_kwargs holds NaN" in capsys.readouterr().err


@pytest.mark.parametrize("weight", [10**400, -(10**400), 1e308, float("nan"), float("-inf")])
def test_a_weight_without_measure_is_no_weight(weight):
    with pytest.raises(DataError, match="weight"):
        Criterion("Rest.", weight)


def test_data_is_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with within(), pytest.raises(DataError, match="expected a regular file"):
            load(tmp_path / f"{name}.jsonl")


@pytest.mark.parametrize("name", ["mine/none", "mine/none.jsonl", "other/none.jsonl"])
def test_a_path_that_is_not_there_is_no_hub_id(name, tmp_path, monkeypatch):
    """A stranger could own the repository `mine/none`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="the hub is not asked"):
        load(name)


@pytest.mark.parametrize(
    "row",
    [
        '{"prompt": "p", "rubric": [{"criterion": "c", "weight": NaN}]}',
        '{"prompt": "p", "rubric": [{"criterion": "c", "weight": 1e999}]}',
        '{"prompt": "p", "rubric": [{"criterion": "c", "weight": -Infinity}]}',
        '{"prompt": "p", "rubric": [{"criterion": "c", "weight": 1e308}, {"criterion": "d", "weight": 1e308}]}',
        '{"prompt": "p", "rubric": [{"criterion": "c", "weight": 1' + "0" * 400 + "}]}",
        '{"prompt": "p", "rubric": [{"criterion": "c", "weight": 1' + "0" * 5000 + "}]}",
        '{"prompt": "p", "rubric": [{"criterion": "c", "weight": true}]}',
        '{"prompt": "p", "rubric": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"prompt": "p", "rubric": ' + "[" * 900 + "]" * 900 + "}",
        '{"prompt": ' + '{"a":' * 900 + "1" + "}" * 900 + ', "rubric": [{"criterion": "c"}]}',
        '{"prompt": "p", "rubric": [{"criterion": "c", "check": '
        + ('{"not":' * 400 + '{"any":["a"]}' + "}" * 400 + "}]}"),
        '{"prompt": "p", "rubric": [{"criterion": "c", "weight": 1, "weight": 2}]}',
    ],
    ids=lambda row: row[:60],
)
def test_a_row_without_measure_is_named(row, tmp_path):
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    with within(), pytest.raises(DataError, match=r"rows\.jsonl"):
        load(tmp_path / "rows.jsonl")
