import json
import os
import subprocess
import sys

import pytest
import yaml

from rgsd import runs
from rgsd.errors import RunError
from rgsd.runs import CONFIG, LOCK, METRICS, RECORD, RESULTS, SAMPLES, SET_ASIDE, create_run, open_run


def test_a_run_records_what_it_was_made_of(tmp_path):
    run = create_run(tmp_path / "run", {"beta": 0.5, "tags": ("a",)})
    meta = json.loads((run.folder / RECORD).read_text())
    assert meta["status"] == "running"
    assert meta["versions"]["torch"]
    assert {"commit", "dirty", "command", "device", "started"} <= meta.keys()
    assert yaml.safe_load((run.folder / CONFIG).read_text()) == {"beta": 0.5, "tags": ["a"]}
    run.append(METRICS, [{"step": 1}])
    run.append(METRICS, [{"step": 2}])
    assert [r["step"] for r in open_run(run.folder).read_lines(METRICS)] == [1, 2]


def test_nothing_is_overwritten_without_being_told(tmp_path):
    run = create_run(tmp_path / "run", {"seed": 1})
    run.note(status="finished")
    run.append(METRICS, [{"step": 1}])
    with pytest.raises(RunError, match=r"holds a run \(finished\).*--overwrite"):
        create_run(run.folder, {})
    assert open_run(run.folder).read_lines(METRICS)
    resumed = create_run(run.folder, {}, resume=True)
    assert resumed.read_lines(METRICS)
    replaced = create_run(run.folder, {"seed": 2}, overwrite=True)
    assert replaced.read_lines(METRICS) == []


def test_a_folder_that_is_not_a_run_is_never_touched(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(RunError, match="do not belong to a run"):
            create_run(tmp_path, {}, overwrite=overwrite)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(RunError, match="is a file"):
        create_run(tmp_path / "thesis.txt", {})


def test_opening_tells_what_is_missing(tmp_path):
    with pytest.raises(RunError, match="not a run folder"):
        open_run(tmp_path)
    run = create_run(tmp_path / "run", {})
    with pytest.raises(RunError, match="'running'"):
        open_run(run.folder, finished=True)
    (run.folder / RECORD).write_text("{")
    with pytest.raises(RunError, match="cannot be read as a run"):
        open_run(run.folder)


def test_half_a_line_is_no_row_is_said_once_and_is_cut_off_before_the_next(tmp_path, capsys):
    run = create_run(tmp_path / "r", {})
    run.append("rows.jsonl", [{"a": 1}, {"a": "two\u2028lines"}])
    with (run.folder / "rows.jsonl").open("a") as file:
        file.write('{"a": 3, "text": "cut of')
    for _ in range(2):
        assert [r["a"] for r in run.read_lines("rows.jsonl")] == [1, "two\u2028lines"]
    assert capsys.readouterr().out.count("half written") == 1
    run.append("rows.jsonl", [{"a": 4}])
    assert [r["a"] for r in run.read_lines("rows.jsonl")] == [1, "two\u2028lines", 4]
    assert (run.folder / "rows.jsonl").read_text().count("\n") == 3


def test_a_whole_last_row_that_lacks_its_newline_is_kept(tmp_path):
    run = create_run(tmp_path / "r", {})
    (run.folder / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}')
    assert [r["a"] for r in run.read_lines("rows.jsonl")] == [1, 2]
    run.append("rows.jsonl", [{"a": 3}])
    assert [r["a"] for r in run.read_lines("rows.jsonl")] == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "line", "problem"),
    [
        ("rows.jsonl", b"not a row", "Expecting value"),
        ("rows.jsonl", b"[1, 2]", "list"),
        ("rows.jsonl", b"", "Expecting value"),
        ("rows.jsonl", b'{"a": "\xff"}', "UTF-8"),
        ("rows.jsonl", b"[" * 100_000, "30 levels"),
    ],
)
@pytest.mark.parametrize("is_last", [False, True])
def test_a_line_that_is_no_row_is_named_with_file_and_number(tmp_path, name, line, problem, is_last):
    run = create_run(tmp_path / "r", {})
    good = b'{"arm": "a", "example_id": "e", "scoring": "s", "score": 1, "verdicts": []}\n'
    (run.folder / name).write_bytes(good + line + b"\n" + (b"" if is_last else good))
    with pytest.raises(RunError, match=rf"{name}, line 2.*{problem}"):
        run.read_lines(name)


def test_rows_set_aside_are_kept_where_nothing_reads_them(tmp_path):
    run = create_run(tmp_path / "r", {})
    rows = [{"a": i, "text": "\ud83d"} for i in range(4)]
    run.append("rows.jsonl", rows)
    assert run.set_aside("rows.jsonl", lambda row: row["a"] in (1, 3)) == 2
    assert [r["a"] for r in run.read_lines("rows.jsonl")] == [0, 2]
    assert [(r["file"], r["row"]["a"]) for r in run.read_lines(SET_ASIDE)] == [("rows.jsonl", 1), ("rows.jsonl", 3)]


# Replacing a run.


def finished(folder):
    run = create_run(folder, {"seed": 1})
    run.append(METRICS, [{"step": 1}])
    run.note(status="finished")
    runs._let_go(folder)
    return folder


def test_a_run_to_be_replaced_stays_until_the_new_one_has_a_result(tmp_path):
    folder = finished(tmp_path / "run")
    new = create_run(folder, {"seed": 2}, overwrite=True)
    new.note(train_fingerprint="x")
    assert open_run(folder).settings == {"seed": 1}  # its start has not passed its checks
    assert new.read_lines(METRICS) == []
    new.begin()
    assert open_run(folder).settings == {"seed": 2}
    assert open_run(folder).meta["train_fingerprint"] == "x"
    assert open_run(tmp_path / "run.replaced").read_lines(METRICS) == [{"step": 1}]
    new.append(SAMPLES, [{"arm": "base"}])
    assert (tmp_path / "run.replaced").is_dir()
    new.write(RESULTS, {})
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_start_that_fails_brings_the_old_run_back(tmp_path, begun):
    folder = finished(tmp_path / "run")
    new = create_run(folder, {"seed": 2}, overwrite=True)
    if begun:
        new.begin()
    new.discard()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert open_run(folder, finished=True).settings == {"seed": 1}
    assert create_run(folder, {}, resume=True).read_lines(METRICS)  # and can be opened again


def test_what_a_failed_start_had_written_is_kept_beside_the_old_run(tmp_path):
    folder = finished(tmp_path / "run")
    new = create_run(folder, {"seed": 2}, overwrite=True)
    new.append(SAMPLES, [{"arm": "base"}])
    new.discard()
    assert open_run(folder, finished=True).settings == {"seed": 1}
    assert (tmp_path / "run.failed" / SAMPLES).is_file()


def killed(folder, *, inside):
    """A process that replaces the run and is killed inside the named function of rgsd.runs."""
    code = (
        "import os\n"
        "from rgsd import runs\n"
        f"before = runs.{inside}\n"
        f"def stop(*a, **k): os._exit(9)\n"
        f"run = runs.create_run({str(folder)!r}, {{'seed': 2}}, overwrite=True)\n"
        f"runs.{inside} = stop\n"
        "run.begin()\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 9


@pytest.mark.parametrize("inside", ["hold", "atomic_write"])
def test_a_replacement_killed_before_it_was_a_run_has_replaced_nothing(tmp_path, inside):
    folder = finished(tmp_path / "run")
    killed(folder, inside=inside)
    assert not (folder / RECORD).is_file()
    with pytest.raises(RunError, match=r"holds a run \(finished\)"):
        create_run(folder, {})
    assert open_run(folder, finished=True).settings == {"seed": 1}


def test_a_replacement_killed_before_its_first_checkpoint_never_costs_the_old_run(tmp_path):
    folder = finished(tmp_path / "run")
    create_run(folder, {"seed": 2}, overwrite=True).begin()
    runs._let_go(folder)  # killed
    third = create_run(folder, {"seed": 3}, overwrite=True)
    third.begin()
    assert open_run(tmp_path / "run.replaced").settings == {"seed": 1}
    third.discard()
    assert open_run(folder, finished=True).settings == {"seed": 1}
    # Gone on with instead, it replaces the old run with its first result.
    create_run(folder, {"seed": 2}, overwrite=True).begin()
    runs._let_go(folder)
    create_run(folder, {"seed": 2}, resume=True).settle()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# A first start that was killed.


@pytest.mark.parametrize("left", [[LOCK], [LOCK, CONFIG], [LOCK, CONFIG, RECORD + ".partial"]])
def test_a_first_start_killed_before_run_json_can_be_begun_again(tmp_path, left):
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).write_text("")
    assert create_run(tmp_path / "run", {"seed": 1}).settings == {"seed": 1}
    assert open_run(tmp_path / "run").settings == {"seed": 1}


def test_a_config_yaml_without_a_runs_lock_is_somebodys_file(tmp_path):
    (tmp_path / CONFIG).write_text("mine: true")
    with pytest.raises(RunError, match="do not belong to a run"):
        create_run(tmp_path, {}, overwrite=True)
    assert (tmp_path / CONFIG).read_text() == "mine: true"


@pytest.mark.parametrize("name", [CONFIG, RECORD])
def test_a_full_disk_at_the_first_start_is_said_and_leaves_nothing(tmp_path, monkeypatch, name):
    write = runs.atomic_write

    def full(path, text):
        if path.name == name:
            raise OSError(28, "No space left on device")
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "atomic_write", full)
        with pytest.raises(RunError, match="No space left"):
            create_run(tmp_path / "run", {})
    assert not (tmp_path / "run").exists()
    assert create_run(tmp_path / "run", {}).meta["status"] == "running"


def test_two_processes_do_not_write_to_one_run(tmp_path):
    run = create_run(tmp_path / "r", {})
    code = (
        "from rgsd.runs import create_run; from rgsd.errors import RunError\n"
        "try:\n"
        f"    create_run({str(run.folder)!r}, {{}}, MODE=True)\n"
        "except RunError as error: print(error)"
    )
    for mode in ("resume", "overwrite"):
        done = subprocess.run(
            [sys.executable, "-c", code.replace("MODE", mode)], capture_output=True, text=True, check=True
        )
        assert f"another process (pid {os.getpid()}) is writing to" in done.stdout
    assert run.folder.is_dir()
    run.append("samples.jsonl", [{"a": 1}])
