"""Seconds that file digests add to one save of a checkpoint: `python -m benchmarks.checkpoint_digests`.

Saves the embedded model with AdamW's two moments in float32, as full training does, and writes the manifest with and
without digests, alternately, three times each on one core. Prints the medians.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch

from rgsd import models
from rgsd.training import checkpoints

TURNS = 3


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    model = models.load_model("embedded", dtype="float32")
    moments = {n: (torch.zeros_like(p), torch.zeros_like(p)) for n, p in model.named_parameters()}
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "checkpoint-1"
        model.save_pretrained(folder)
        torch.save(moments, folder / "optimizer.pt")
        size = sum(p.stat().st_size for p in folder.rglob("*"))
        checkpoints.write_manifest(folder, step=1)  # flush the files to disk before timing
        for _ in range(TURNS):
            for label, found in seconds.items():
                checkpoints._DIGESTS.clear()
                digest = checkpoints._digest if label == "with" else lambda path: ""
                with patch.object(checkpoints, "_digest", digest):
                    start = time.perf_counter()
                    checkpoints.write_manifest(folder, step=1)
                    found.append(time.perf_counter() - start)
    medians = {label: statistics.median(found) for label, found in seconds.items()}
    print(f"{size / 2**20:,.0f} MiB: {medians['with']:.2f} s with digests, {medians['without']:.2f} s without")


if __name__ == "__main__":
    main()
