"""One grammar names what every command measures or compares."""

import pytest

from rgsd.errors import ConfigError, RunError
from rgsd.evaluation.run_ref import RunRef


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Two runs, one of them with a colon and a plus sign in its name."""
    for name in ("run", "a:b+rubric"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected", "policy_arm", "stored_arm"),
    [
        ("owner/name", RunRef("owner/name"), "name", ""),
        ("owner/name+rubric", RunRef("owner/name", privileged_context="rubric"), "name+rubric", ""),
        ("models/a+b", RunRef("models/a+b"), "a+b", ""),
        ("llama3:8b", RunRef("llama3:8b"), "llama3:8b", ""),
        ("run", RunRef("run"), "trained", ""),
        ("run:base+mismatched", RunRef("run", "base", "mismatched"), "base+mismatched", "base+mismatched"),
        ("a:b+rubric", RunRef("a:b+rubric"), "trained", ""),
        ("a:b+rubric:base", RunRef("a:b+rubric", "base"), "base", "base"),
    ],
)
def test_a_name_is_a_source_an_arm_and_a_privileged_context(text, expected, policy_arm, stored_arm):
    for parse in (RunRef.parse, RunRef.parse_policy):
        ref = parse(text)
        assert ref == expected
        assert (ref.policy_arm, ref.stored_arm) == (policy_arm, stored_arm)


def test_a_stored_arm_may_have_any_name():
    assert RunRef.parse("run:base+rubric (cover)").stored_arm == "base+rubric (cover)"
    assert RunRef.parse("run:a:b").stored_arm == "a:b"


@pytest.mark.parametrize("text", ["", "+rubric", ":base"])
def test_a_name_without_a_source_is_refused(text):
    with pytest.raises(ConfigError, match="no model or run"):
        RunRef.parse(text)


def test_a_policy_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="'best'"):
        RunRef.parse_policy("run:best")
    with pytest.raises(RunError, match="owner/name is not a run"):
        RunRef.parse_policy("owner/name:base")
