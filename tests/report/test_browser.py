"""The pages in headless Chromium, opened from the disk. `RGSD_NODE_MODULES` names a node_modules folder with
playwright-core and axe-core (`npm install playwright-core axe-core` in any folder makes one)."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support.made_runs import make_runs
from support.reports import arm_rows, made

from rgsd.cli import main

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[1] / "support" / "browser" / "check.cjs"
SECONDS_TO_OPEN = 2.0
RESPONSES = 2_000


def browser() -> tuple[str, str, str]:
    """node, its modules and Chromium; skips if one is missing."""
    node = shutil.which("node")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    modules = os.environ.get("RGSD_NODE_MODULES", "")
    if not node:
        pytest.skip("no node on the path")
    if not chromium:
        pytest.skip("no chromium on the path")
    if not all((Path(modules) / name).is_dir() for name in ("playwright-core", "axe-core")):
        pytest.skip("RGSD_NODE_MODULES names no folder with playwright-core and axe-core")
    return node, modules, chromium


@pytest.fixture(scope="module")
def seen(tmp_path_factory, tokenizer):
    """Chromium's view of a report, a report of two runs, a token map, and a report of 2,000 responses."""
    node, modules, chromium = browser()
    folder = make_runs(tmp_path_factory.mktemp("browser"), tokenizer)
    base = f"{folder / 'rgsd'}:base"
    for i, example in enumerate(json.loads((folder / "rgsd" / "split.json").read_text())["held_out"][:2]):
        out = str(folder / ("map.html" if i == 0 else "second.html"))
        assert main(["explain", base, example, "-o", out, "--keep", "true"]) == 0
    text = "A long response of many words.\n" * 60
    big = made(
        folder / "big",
        arm_rows("base", [i % 7 / 7 for i in range(RESPONSES // 2)], text=text),
        arm_rows("trained", [i % 5 / 5 for i in range(RESPONSES // 2)], text=text + "More."),
    )
    pages = {"one": [folder / "rgsd"], "two": [folder / "rgsd", folder / "grpo"], "big": [big]}
    for name, runs in pages.items():
        assert main(["report", *map(str, runs), "-o", str(folder / f"{name}.html")]) == 0
    files = [str(folder / f"{name}.html") for name in (*pages, "map")]
    out = tmp_path_factory.mktemp("pictures")
    done = subprocess.run(
        [node, str(SCRIPT), modules, chromium, str(out), *files], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    return {Path(file).stem: {v["view"]: v for v in views} for file, views in found.items()}


PAGES = ("one", "two", "big", "map")
VIEWS = ("desktop-light", "desktop-dark", "phone")


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_quiet_fits_and_is_accessible(seen, name, view):
    one = seen[name][view]
    assert one["console"] == []
    assert one["requests"] == []
    scroll, client = one["width"]
    assert scroll <= client
    assert view != "phone" or client == 390
    assert [v for v in one["axe"] if v["impact"] in ("serious", "critical")] == []


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["one", "map"])
def test_selecting_a_token_shows_the_top_tokens(seen, name, view):
    one = seen[name][view]
    assert one["tokens"] > 3
    nothing, pointed, moved = one["told"]
    assert "Point at a word" in nothing
    for told in (pointed, moved):
        assert "nats apart" in told
        assert "Teacher\u2019s top tokens" in told
        assert "Student\u2019s top tokens" in told
    assert pointed != moved
    assert one["active"].endswith("-3")
    assert min(one["colours"]) > 2


@pytest.mark.parametrize("view", VIEWS)
def test_two_thousand_responses_open_at_once_ten_at_a_time(seen, view):
    one = seen["big"][view]
    assert one["open_ms"] < 1000 * SECONDS_TO_OPEN
    assert one["prompts"] == 10
    assert one["count"] == ["1,000 prompts"]
    assert one["walked"][:2] == ["e0", "e10"]
    assert one["walked"][2] == "e14"  # 0 of 7 before, 4 of 5 after: the first of the most gained
    assert one["found_none"] == "0 prompts"


def test_theme_and_print_work(seen):
    assert seen["one"]["desktop-light"]["theme"] == "dark"
    assert seen["one"]["desktop-dark"]["theme"] == "light"
    assert seen["one"]["desktop-light"]["pdf_bytes"] > 20_000
