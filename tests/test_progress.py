"""Progress: a live view in a terminal, plain lines elsewhere."""

import io

import pytest
from rich.console import Console

from rgsd import progress
from rgsd.progress import SHADES, Steps, counting, trend

LOGS = {"loss": 0.5, "divergence": 0.1234, "clipped_share": 0.25, "response_length": 60.0, "leak_rate": 0.0}


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None, legacy_windows=False)


def test_plain_lines_where_nobody_looks(capsys):
    steps = Steps()
    steps.show(1, 4, LOGS, 30.0)
    steps.show(2, 4, {"loss": 0.0, "reward": 0.5, "judge/total_calls": 8.0, "completions/mean_length": 9.0}, 20.0)
    steps.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first == (
        "  step 1/4: loss 0.5000, divergence 0.1234 nats, clipped 25 %, response 60 tokens, leak 0 %, about 30 s left"
    )
    assert second == "  step 2/4: reward 0.500, unscored 0 %, judge calls 8, response 9 tokens, about 20 s left"


def test_fine_tuning_shows_its_own_loss_and_nothing_that_it_does_not_have(capsys):
    steps = Steps()
    steps.show(1, 2, {"loss": 2.5, "mean_token_accuracy": 0.4}, 3.0)
    steps.show(2, 2, {"loss": 2.25}, 0.0)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "  step 1/2: loss 2.5000 nats per token, token accuracy 40 %, about 3 s left"
    assert second == "  step 2/2: loss 2.2500 nats per token, about 0 s left"


def test_the_live_view_shows_the_numbers_and_their_course():
    console = terminal()
    steps = Steps(console)
    for step, value in enumerate((0.4, 0.3, 0.1), start=1):
        steps.show(step, 3, LOGS | {"divergence": value}, 90.0 * (3 - step))
    steps.close()
    seen = console.file.getvalue()
    assert "step 2/3" in seen
    assert "about 90 s left" in seen
    assert "about 3 min left" in seen
    assert "done" in seen
    last = seen[seen.rindex("step 3/3") :]
    assert "0.1000 nats" in last
    assert "25 %" in last
    assert trend([0.4, 0.3, 0.1]) in last
    assert "reward" not in last  # not logged
    assert "\x1b[?25h" in seen  # the cursor is back
    steps.close()


def test_what_others_print_stays_above_the_live_view(capsys):
    console = terminal()
    steps = Steps(console)
    steps.show(1, 2, LOGS, 1.0)
    progress.say("a line of somebody else")
    steps.show(2, 2, LOGS, 0.0)
    steps.close()
    seen = console.file.getvalue()
    assert seen.index("a line of somebody else") < seen.rindex("step 2/2")


def test_a_number_that_comes_late_or_goes_missing_leaves_a_gap():
    console = terminal()
    steps = Steps(console)
    steps.show(1, 3, {"loss": 1.0}, 0.0)
    steps.show(2, 3, LOGS, 0.0)
    steps.show(3, 3, {"loss": 1.0}, 0.0)
    steps.close()
    assert steps._past["divergence"][0] == 0.1234
    assert "nan" not in console.file.getvalue()


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([], ""),
        ([1.0], SHADES[0]),
        ([2.0, 2.0], SHADES[0] * 2),
        ([0.0, 7.0], SHADES[0] + SHADES[-1]),
        ([0.0, float("nan"), 7.0], SHADES[0] + " " + SHADES[-1]),
        ([float("inf")], ""),
        (list(range(100)), None),
    ],
)
def test_trends(values, shown):
    found = trend(values)
    assert found == shown if shown is not None else len(found) == progress.TREND and found[-1] == SHADES[-1]


@pytest.mark.parametrize(("variable", "value"), [("TERM", "dumb"), ("RGSD_PLAIN", "1")])
def test_a_terminal_can_ask_for_plain_lines(monkeypatch, variable, value):
    monkeypatch.setattr("sys.stdout", terminal().file)
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("RGSD_PLAIN", raising=False)
    assert progress._is_terminal()
    monkeypatch.setenv(variable, value)
    assert not progress._is_terminal()
    with counting("x", 2) as counter:
        assert isinstance(counter, progress.Counter)
