"""Files, folders, the hub and the bundled data; schema detection; bad rows."""

from __future__ import annotations

import importlib.resources
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.exceptions import DatasetGenerationError
from support import published_rows

from rgsd.data import SCHEMAS, bundled, load
from rgsd.data.reading import hub_rows
from rgsd.errors import DataError


def own(number: int, **changes: Any) -> dict[str, Any]:
    """A small row of our own schema."""
    return {"id": f"r{number}", "prompt": f"Question {number}?", "rubric": [{"criterion": "Answers."}]} | changes


def write_jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, *rows: dict[str, Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def comparable(loaded) -> list[Any]:
    """Examples without generated ids, which contain the file's name."""
    return [(e.messages, e.rubric, e.scoring, e.reference, e.domain, e.tags, dict(e.metadata)) for e in loaded.examples]


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", published_rows.NAMES)
def test_json_jsonl_parquet_and_a_folder_give_the_same_examples(tmp_path: Path, name):
    rows = [published_rows.row(name), published_rows.other_row(name)]
    jsonl = load(write_jsonl(tmp_path / "rows.jsonl", *rows))
    assert (jsonl.schema, jsonl.n_rows, jsonl.problems, jsonl.files) == (name, 2, (), ("rows.jsonl",))
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows))
    wrapped = tmp_path / "wrapped.json"
    wrapped.write_text(json.dumps({"version": 1, "data": rows}))
    folder = tmp_path / "folder"
    folder.mkdir()
    write_jsonl(folder / "b.jsonl", rows[1])
    write_parquet(folder / "a.parquet", rows[0])
    (folder / "README.md").write_text("not rows")
    parquet = write_parquet(tmp_path / "rows.parquet", *rows)
    for other in (array, wrapped, parquet, folder):
        loaded = load(other)
        assert loaded.schema == name
        assert comparable(loaded) == comparable(jsonl)
    assert load(folder).files == ("a.parquet", "b.jsonl")


def test_parquet_fills_unused_fields_with_nothing_and_they_stay_unused(tmp_path: Path):
    checks = [{"any": ["a"]}, {"count": {"of": "words", "max": 5}}, None]
    rows = [own(n, rubric=[{"criterion": "c", "check": check}]) for n, check in enumerate(checks)]
    loaded = load(write_parquet(tmp_path / "rows.parquet", *rows))
    assert [e.rubric.criteria[0].check for e in loaded.examples] == checks


def test_a_folder_is_read_in_the_order_of_its_names_and_ids_lead_back(tmp_path: Path):
    for name in ("c", "a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", {"prompt": f"From {name}?", "rubric": [{"criterion": "x"}]})
    assert [e.id for e in load(tmp_path).examples] == ["a.jsonl#1", "b.jsonl#1", "c.jsonl#1"]


def test_a_bom_and_blank_lines_and_crlf_are_accepted(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(own(1)).encode() + b"\r\n\r\n  \n" + json.dumps(own(2)).encode())
    loaded = load(path)
    assert [e.id for e in loaded.examples] == ["r1", "r2"]
    assert loaded.n_rows == 2
    array = tmp_path / "rows.json"
    array.write_bytes(b"\xef\xbb\xbf" + json.dumps([own(1)]).encode())
    assert load(str(array)).n_rows == 1


def test_a_line_separator_inside_a_text_does_not_cut_the_line(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(own(1, prompt="One\u2028two?"), ensure_ascii=False), encoding="utf-8")
    assert load(path).examples[0].messages[0]["content"] == "One\u2028two?"


def test_limit_counts_rows_read(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", own(1), "{broken", own(3), own(4))
    loaded = load(path, limit=3, skip_bad_rows=True)
    assert (loaded.n_rows, len(loaded.examples), len(loaded.problems)) == (3, 2, 1)
    with pytest.raises(DataError, match=r"got limit=0, expected a whole number of at least 1"):
        load(path, limit=0)


# ---------------------------------------------------------------- bad rows


def test_bad_rows_are_collected_and_counted(tmp_path: Path):
    rows = [own(1), "{broken", own(3, rubric=[]), "[1]", own(5)]
    path = write_jsonl(tmp_path / "rows.jsonl", *rows)
    with pytest.raises(DataError) as caught:
        load(path)
    message = str(caught.value)
    assert "3 of 5 rows cannot be used" in message
    assert "rows.jsonl, row 2: got a line that is not JSON" in message
    assert "rows.jsonl, row 3, field rubric: got a list of 0" in message
    assert "rows.jsonl, row 4: got a list of 1, expected an object with named fields" in message
    assert "skip_bad_rows=True" in message
    loaded = load(path, skip_bad_rows=True)
    assert [e.id for e in loaded.examples] == ["r1", "r5"]
    assert [p.row for p in loaded.problems] == [2, 3, 4]
    assert loaded.n_rows == len(loaded.examples) + len(loaded.problems)


def test_the_error_lists_twenty_and_the_count(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", *(own(n, rubric=None) for n in range(27)))
    with pytest.raises(DataError) as caught:
        load(path)
    assert "27 of 27 rows" in str(caught.value)
    assert str(caught.value).count("field rubric:") == 20
    assert "... and 7 more" in str(caught.value)


def test_skipping_every_row_is_an_error(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", own(1, rubric=None))
    with pytest.raises(DataError, match="1 of 1 rows cannot be used") as caught:
        load(path, skip_bad_rows=True)
    assert "no usable row" in str(caught.value)


def test_a_file_without_one_object_lists_its_bad_rows(tmp_path: Path):
    with pytest.raises(DataError, match="2 of 2 rows cannot be used"):
        load(write_jsonl(tmp_path / "rows.jsonl", "nonsense", "12"))


def test_duplicate_ids_name_the_first_row(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", own(1), own(2), own(1, prompt="Another?"))
    (problem,) = load(path, skip_bad_rows=True).problems
    assert (problem.row, problem.field) == (3, "id")
    assert "got the id 'r1', which rows.jsonl, row 1 already has" in problem.message


def test_duplicate_ids_are_seen_across_files(tmp_path: Path):
    write_jsonl(tmp_path / "a.jsonl", own(1))
    write_jsonl(tmp_path / "b.jsonl", own(1))
    with pytest.raises(DataError, match=r"b\.jsonl, row 1, field id: got the id 'r1', which a\.jsonl, row 1"):
        load(tmp_path)


def test_a_key_that_stands_twice_is_a_bad_row(tmp_path: Path):
    twice = '{"id": "x", "prompt": "p", "rubric": [{"criterion": "a", "criterion": "b"}]}'
    (problem,) = load(write_jsonl(tmp_path / "rows.jsonl", own(1), twice), skip_bad_rows=True).problems
    assert "'criterion'" in problem.message


def test_bytes_that_are_not_utf8(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(own(1)).encode() + b'\n{"prompt": "\xff"}\n')
    (problem,) = load(path, skip_bad_rows=True).problems
    assert problem.row == 2
    assert "not UTF-8 (at byte 13 of the line)" in problem.message
    array = tmp_path / "rows.json"
    array.write_bytes(b'[{"prompt": "\xff"}]')
    with pytest.raises(DataError, match="not UTF-8"):
        load(array)


def test_nesting_beyond_reason_is_a_bad_row(tmp_path: Path):
    deep = '{"prompt": "p", "rubric": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (problem,) = load(write_jsonl(tmp_path / "rows.jsonl", own(1), deep), skip_bad_rows=True).problems
    assert "nested too deeply" in problem.message


# ---------------------------------------------------------------- files that cannot be read


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", "", "without rows"),
        ("rows.jsonl", "\n \n", "without rows"),
        ("rows.json", "", "without rows"),
        ("rows.json", "[]", "without rows"),
        ("rows.json", '{"data": []}', "without rows"),
        ("rows.json", '{"a": 1}\n{"a": 2}', r"\.jsonl"),
        ("rows.json", "[1, 2", "not JSON"),
        ("rows.json", "3", "type int"),
        ("rows.json", '{"a": [1], "b": [2]}', "got one object with the keys a, b"),
        ("rows.json", '{"prompt": "p", "rubric": [{"criterion": "c"}]}', r"wrap the rows in \[ \]"),
        ("rows.parquet", "not parquet", "as parquet"),
        ("rows.csv", "a,b", r"the suffix '\.csv', expected \.json or \.jsonl or \.parquet"),
        ("rows", "a", "the suffix ''"),
    ],
)
def test_a_file_that_cannot_be_read(tmp_path: Path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message):
        load(path)


def test_an_empty_parquet_file(tmp_path: Path):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    with pytest.raises(DataError, match="without rows"):
        load(path)


def test_an_empty_file_in_a_folder_is_named(tmp_path: Path):
    write_jsonl(tmp_path / "a.jsonl", own(1))
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(DataError, match=r"b\.jsonl: got a file without rows"):
        load(tmp_path)


def test_a_folder_without_files_of_rows(tmp_path: Path):
    with pytest.raises(DataError, match="got a folder with nothing"):
        load(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match=r"got a folder with notes\.txt, expected"):
        load(tmp_path)


@pytest.mark.parametrize("source", ["no/such/file.jsonl", "missing.jsonl", "./owner/name", ""])
def test_a_path_that_does_not_exist(source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"neither an existing path|got a folder with nothing"):
        load(source)


def test_a_source_that_is_no_path():
    with pytest.raises(DataError, match=r"got a list of 1 as a source"):
        load(["rows.jsonl"])


def test_split_is_for_the_hub(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", own(1))
    with pytest.raises(DataError, match="split and config"):
        load(path, split="train")


# ---------------------------------------------------------------- recognition


def test_rows_of_no_known_schema(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", {"text": "a", "label": 1})
    with pytest.raises(DataError) as caught:
        load(path)
    assert "the keys label, text" in str(caught.value)
    assert "the keys label, text" in str(caught.value)
    assert all(f"{name}: {schema.SUMMARY}" in str(caught.value) for name, schema in SCHEMAS.items())


def test_rows_of_two_schemas(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", published_rows.row("healthbench"), published_rows.row("prbench"))
    with pytest.raises(DataError, match=r"healthbench \(1 rows\) and prbench \(1 rows\), expected exactly one"):
        load(path)


def test_a_row_of_another_schema_after_the_sample_is_a_bad_row(tmp_path: Path):
    rows = [own(n) for n in range(25)] + [published_rows.row("verl")]
    (problem,) = load(write_jsonl(tmp_path / "rows.jsonl", *rows), skip_bad_rows=True).problems
    assert problem.row == 26
    assert "got a row of schema 'verl', expected one of schema 'rgsd'" in problem.message


def test_a_row_of_no_schema_is_a_bad_row_of_the_files_schema(tmp_path: Path):
    loaded = load(write_jsonl(tmp_path / "rows.jsonl", own(1), {"text": "a"}), skip_bad_rows=True)
    assert [p.field for p in loaded.problems] == ["text"]


def test_a_misspelt_rubric_key_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"field rubrik: got the unknown key 'rubrik'.*did you mean 'rubric'\?"):
        load(write_jsonl(tmp_path / "rows.jsonl", {"prompt": "p", "rubrik": []}))


def test_a_schema_by_name(tmp_path: Path):
    path = write_jsonl(tmp_path / "rows.jsonl", published_rows.row("rubrichub"))
    loaded = load(path, schema="verl")
    assert loaded.schema == "verl"
    assert loaded.examples[0].rubric == load(path).examples[0].rubric
    with pytest.raises(DataError, match=r"got schema='healthbnch'.*did you mean 'healthbench'\?"):
        load(path, schema="healthbnch")


# ---------------------------------------------------------------- the hub


class FakeHub:
    """A fake `datasets.load_dataset`: records its arguments and returns the rows of a split."""

    def __init__(self, **splits: list[dict[str, Any]]) -> None:
        self.splits = splits
        self.asked: dict[str, Any] = {}

    def __call__(self, path: str, **options: Any) -> Any:
        self.asked = {"id": path, **options}
        if path == "broken/build":
            raise DatasetGenerationError("An error occurred while generating the dataset")
        if path == "no/body":
            raise FileNotFoundError("Dataset 'no/body' doesn't exist on the Hub")
        split = options.get("split")
        if split is None:
            return self.splits
        if split not in self.splits:
            raise ValueError(f"Unknown split {split!r}")
        return self.splits[split]


def test_hub_rows_with_a_split():
    hub = FakeHub(train=[own(1), own(2)], test=[own(3)])
    rows = list(hub_rows("some/set", "test", "medical", hub))
    assert hub.asked == {"id": "some/set", "name": "medical", "split": "test"}
    assert [(r.file, r.row, r.value["id"]) for r in rows] == [("some/set/test", 1, "r3")]


def test_hub_rows_of_the_only_split():
    assert [r.file for r in hub_rows("some/set", None, None, FakeHub(train=[own(1)]))] == ["some/set/train"]


def test_hub_rows_of_one_file():
    hub = FakeHub(train=[own(1)])
    assert len(list(hub_rows("some/set:data/part.parquet", None, None, hub))) == 1
    assert hub.asked == {"id": "some/set", "data_files": "data/part.parquet"}


@pytest.mark.parametrize(
    ("source", "split", "message"),
    [
        ("some/set", None, "got the splits train, test, expected one: pass split="),
        ("some/set", "val", "Unknown split 'val'.*check the id, the split"),
        ("no/body", None, "doesn't exist on the Hub"),
        ("broken/build", None, "error occurred while generating"),
        ("some/set", "empty", "without rows"),
        ("not a hub id", None, "expected a hub id"),
    ],
)
def test_hub_rows_that_cannot_be_had(source, split, message):
    hub = FakeHub(train=[own(1)], test=[own(2)])
    if split == "empty":
        hub.splits["empty"] = []
    with pytest.raises(DataError, match=message):
        list(hub_rows(source, split, None, hub))


def test_a_dataset_of_the_datasets_library_is_read():
    from datasets import Dataset, DatasetDict

    table = DatasetDict({"train": Dataset.from_list([published_rows.row("healthbench")])})
    (raw,) = hub_rows("some/set", None, None, lambda name: table)
    assert SCHEMAS["healthbench"].matches(raw.value)


# ---------------------------------------------------------------- what comes with the package


def bundled_names() -> list[str]:
    folder = importlib.resources.files("rgsd.data") / "bundled"
    return sorted(p.name for p in folder.iterdir() if p.name.endswith(".jsonl")) if folder.is_dir() else []


@pytest.mark.skipif(not bundled_names(), reason="the package's data are not written yet")
def test_bundled_data():
    everything = bundled()
    assert everything.schema == "rgsd"
    assert everything.files == tuple(bundled_names())
    assert load("bundled").examples == everything.examples
    domain = bundled_names()[0].removesuffix(".jsonl")
    assert load(f"bundled:{domain}").examples == bundled(domain).examples


def test_a_bundled_domain_that_is_not_there():
    with pytest.raises(DataError, match="bundled"):
        bundled("astrology")


def test_nothing_heavy_is_imported():
    script = (
        "import sys, rgsd.data;"
        "print(sorted({'torch', 'transformers', 'pyarrow', 'datasets', 'numpy', 'pandas'} & set(sys.modules)))"
    )
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={"PYTHONPATH": paths}
    )
    assert done.stdout.strip() == "[]"
