"""Builds the bundled data, src/rgsd/data/bundled/{medicine,science}.jsonl, from the YAML files in this folder.

    python data_source/build.py           writes the two files
    python data_source/build.py --check   exits with 1 if they do not match the sources

`kinds.yaml` defines what each kind of question wants and penalizes. `prompts/KIND.yaml` holds the prompts with their
own facts and references. A rubric consists of its kind's criteria, the prompt's facts, and the pitfalls.

The check of a fact is written in short form and compiled to the language of `rgsd.rubrics.checks`:

    "cool & water|tap"       one sentence contains "cool" and "water" or "tap", without a negation before them
    "!rub"                   one sentence contains "rub" after a negation ("do not rub")
    "!(?:wait)|at once"      either "wait" after a negation, or "at once" without one
    "{CALL}"                 a pattern named in kinds.yaml
    "finished"               a check too complex for this form, from finished_checks.jsonl

Parts are regular expressions that match whole words. Questions never match.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
TARGET = HERE.parent / "src" / "rgsd" / "data" / "bundled"
DOMAINS = {"med": "medicine", "sci": "science"}

IN_SENTENCE = r"(?:[^.!?\n]|\.\d)"  # a decimal point does not end a sentence
REACH = "{0,400}"  # search range in characters; without it, a text of one endless sentence takes seconds
NEGATION = (
    r"\b(?:(?<!\()not?(?![,:;]| (?:only|just|less|fewer)\b)|never|none|nothing(?! (?:is|else is) wrong)|neither|nor|"
    r"without|cannot|avoid\w*|rather than|instead of|unlikely|\w+n't)\b"
)
# A check starts anew at each sentence or clause, so a negation reaches no farther than it does in English.
CLAUSE = (
    r"""(?:^|[.!?]["')*]*\s|;|\bbut\b|\b(?:if|when|until|unless|because|since|while)\b[^,.!?\n]{0,120},)"""
    rf"(?!{IN_SENTENCE}{REACH}\?)"
)


def alternatives(part: str) -> list[str]:
    """Split a part at each `|` outside brackets."""
    pieces, depth = [""], 0
    for before, char in zip(" " + part, part, strict=False):
        depth += (char in "([" and before != "\\") - (char in ")]" and before != "\\")
        if char == "|" and depth == 0:
            pieces.append("")
        else:
            pieces[-1] += char
    return pieces


def sentence_part(part: str) -> str:
    """A lookahead for one part of a fact: without a negation before it, or after one if marked with `!`."""
    plain, negated = [], []
    whole = part.startswith("!") and not part.startswith("!(")
    for piece in alternatives(part.removeprefix("!") if whole else part):
        (negated if whole or piece.startswith("!") else plain).append(piece.removeprefix("!"))
    found = []
    if plain:
        found.append(rf"(?:(?!{NEGATION}){IN_SENTENCE}){REACH}?(?<!\w)(?:{'|'.join(plain)})(?!\w)")
    if negated:
        found.append(rf"{IN_SENTENCE}{REACH}?{NEGATION}[^.!?\n;]{{0,60}}?(?<!\w)(?:{'|'.join(negated)})(?!\w)")
    return f"(?={'|'.join(found)})"


def compiled(check: str, words: Mapping[str, str]) -> dict[str, Any]:
    """The check of a fact, in the language of `rgsd.rubrics.checks`."""
    for name, pattern in words.items():
        check = check.replace(f"{{{name}}}", pattern)
    return {"regex": CLAUSE + "".join(sentence_part(part.strip()) for part in re.split(r"\s&\s", check))}


@dataclass(frozen=True)
class Sources:
    """The sources of rubrics besides the prompts."""

    words: dict[str, str]
    forms: dict[str, dict[str, Any]]
    kinds: dict[str, dict[str, Any]]
    finished: dict[tuple[str, str], dict[str, Any]]

    def criterion(self, of: str, given: Mapping[str, Any], tags: list[str]) -> dict[str, Any]:
        """A criterion that belongs to the prompt `of` only."""
        short = given["check"]
        check = self.finished[of, given["says"]] if short == "finished" else compiled(short, self.words)
        return {"criterion": given["says"], "weight": given["weight"], "tags": given.get("tags", tags), "check": check}


def sources() -> Sources:
    """Read kinds.yaml and finished_checks.jsonl."""
    kinds = yaml.safe_load((HERE / "kinds.yaml").read_text("utf-8"))
    lines = (HERE / "finished_checks.jsonl").read_text("utf-8").splitlines()
    finished = {(c["id"], c["criterion"]): c["check"] for c in map(json.loads, lines)}
    return Sources(kinds["words"], kinds["forms"], kinds["kinds"], finished)


def row(entry: dict[str, Any], kind: str, given: Sources) -> dict[str, Any]:
    """One row: the kind's criteria, the prompt's own facts, then the pitfalls."""
    of, forms = entry["id"], given.forms
    wants = [
        {"criterion": forms[f]["wanted"], "weight": weight, "tags": [forms[f]["tag"], f], "check": forms[f]["check"]}
        for f, weight in given.kinds[kind]["wants"].items()
    ]
    facts = [given.criterion(of, fact, ["content", "own"]) for fact in entry["facts"]]
    pitfalls = [
        {"criterion": pitfall["says"], "weight": pitfall["weight"], "tags": ["pitfall", f], "check": forms[f]["check"]}
        for f, pitfall in given.kinds[kind]["penalises"].items()
    ]
    claims = [given.criterion(of, claim, ["pitfall", "claim"]) for claim in entry.get("pitfalls", [])]
    return {
        "id": of,
        "domain": DOMAINS[of.split("-")[0]],
        "tags": [f"kind:{kind}", f"split:{entry['split']}"],
        "prompt": entry["prompt"],
        "rubric": wants + facts + pitfalls + claims,
        "reference": entry["reference"].strip(),
    }


def rows() -> dict[str, list[dict[str, Any]]]:
    """Domain -> its rows, sorted by id."""
    given = sources()
    built = [
        row(entry, kind, given)
        for kind in given.kinds
        for entry in yaml.safe_load((HERE / "prompts" / f"{kind}.yaml").read_text("utf-8"))
    ]
    built.sort(key=lambda r: r["id"])
    return {domain: [r for r in built if r["domain"] == domain] for domain in DOMAINS.values()}


def files() -> dict[Path, str]:
    """The two files and their contents."""
    return {
        TARGET / f"{domain}.jsonl": "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in of_domain)
        for domain, of_domain in rows().items()
    }


def main(argv: list[str]) -> int:
    """Write the files, or list those that are out of date with --check."""
    stale = [path for path, text in files().items() if not path.exists() or path.read_text("utf-8") != text]
    if argv == ["--check"]:
        for path in stale:
            print(f"{path.name} does not match data_source: run python data_source/build.py")
        return 1 if stale else 0
    for path, text in files().items():
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
