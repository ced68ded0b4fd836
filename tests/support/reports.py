"""Run folders with given scores, and a parser for the pages that rgsd writes."""

import json
from html.parser import HTMLParser

from rgsd.report import read, report_page
from rgsd.runs import create_run


class Page(HTMLParser):
    """A page's elements and its text outside of scripts and styles."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.inside, self.text, self.raw = [], None, [], {"script": [], "style": []}
        self.feed(html)
        self.words = " ".join(" ".join(self.text).split())
        self.data = json.loads(self.raw["script"][0])

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in self.raw:
            self.inside = tag
            self.raw[tag].append("")

    def handle_endtag(self, tag):
        self.inside = None if tag == self.inside else self.inside

    def handle_data(self, text):
        if self.inside:
            self.raw[self.inside][-1] += text
        else:
            self.text.append(text)


def page_of(*folders):
    return Page(report_page(read([str(f) for f in folders])))


def arm_rows(name, scores, *, tokens=10, verdicts=None, text="a response"):
    """Rows of one arm as an evaluation writes them."""
    return [
        {
            "arm": name,
            "example_id": f"e{i}",
            "domain": "medicine",
            "tags": [],
            "scoring": "satisfaction",
            "question": f"question {i}",
            "response": text,
            "judged_text": text,
            "n_tokens": tokens,
            "is_truncated": False,
            "score": s,
            "coverage": 0.0 if s is None else 1.0,
            "judge": "checks",
            "verdicts": (verdicts or (lambda s, i: [{"criterion": "Good.", "weight": 1.0, "tags": ["kind"],
                         "met": None if s is None else s > 0.5, "grade": None, "reason": ""}]))(s, i),
            "replies": [],
            "usage": {"calls": 0, "cached": 0, "price": 0.0},
            "problem": "timeout" if s is None else "",
        }
        for i, s in enumerate(scores)
    ]  # fmt: skip


def made(folder, *arms, settings=None, **meta):
    """A run folder with these arms."""
    run = create_run(folder, {"seed": 0, "clip_threshold": 0.05, "privileged_context": "rubric"} | (settings or {}))
    for rows in arms:
        run.append("samples.jsonl", rows)
    run.note(**({"status": "finished"} | meta))
    return folder
