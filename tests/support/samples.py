"""Samples with only the fields that a test needs."""

from rgsd.evaluation.samples import Sample


def sample(example_id="e0", score=None, verdicts=(), **fields):
    """A sample; its verdicts are dictionaries, as in samples.jsonl."""
    row = {"arm": "base", "example_id": example_id, "scoring": "satisfaction", "score": score}
    return Sample.from_row({**row, "verdicts": list(verdicts), **fields})


def samples(rows):
    """Lines of samples.jsonl as samples."""
    return [Sample.from_row(row) for row in rows]
