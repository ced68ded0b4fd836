"""Writes the tables and the plot of docs/BENCHMARKS.md from results.json."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def write(results: dict[str, Any], document: Path, figures: Path) -> None:
    """Write the tables between the document's markers, and the plot into its folder."""
    text = document.read_text()
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{document} has no markers {BEGIN} ... {END}: add them where the tables belong")
    if "growth" in results:
        plot(results["growth"]["results"], figures / "growth.svg")
    inside = "\n".join(lines(results))
    document.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{inside}\n{END}", text, flags=re.DOTALL))


def lines(results: dict[str, Any]) -> Iterator[str]:
    """The summary table, the machines, and the growth table."""
    yield "| | measured | target | threads | load before | date |"
    yield "|---|---|---|---|---|---|"
    for name, result in results.items():
        machine = result["machine"]
        for what, measured, target in _headlines(name, result):
            quick = ", quick" if result["quick"] else ""
            yield (
                f"| {what} | {measured} | {target} | {machine['threads']} | {machine['load_before']} | "
                f"{result['at']}{quick} |"
            )
    yield ""
    for machine in {_named(r["machine"]): None for r in results.values()}:
        yield f"Machine: {machine}."
        yield ""
    if "growth" in results:
        yield from _growth(results["growth"])


def _named(m: dict[str, Any]) -> str:
    return (
        f"{m['cpu']}, {m['cores']} cores ({', '.join(m['extensions'])}); Python {m['python']}, torch {m['torch']}, "
        f"transformers {m['transformers']}, TRL {m['trl']}, PEFT {m['peft']}"
    )


def _both(ratio: dict[str, float]) -> str:
    return f"{ratio['wall']:.2f} (CPU time {ratio['cpu']:.2f})"


def _headlines(name: str, r: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    if name == "p1_step":
        for part in (r, r["large"]):
            seconds, setting = part["seconds"], part["setting"]
            yield (
                f"P1: step, {setting['rows']} prompts, micro-batches: {setting['micro_batches']}, rgsd / SDFT "
                f"({seconds['rgsd']['wall']:.1f} s / {seconds['sdft']['wall']:.1f} s)",
                _both(part["rgsd/sdft"]),
                "<= 0.5",
            )
        naive, rows = r["seconds"]["naive"]["wall"], r["setting"]["rows"]
        yield f"P1: step, {rows} prompts, rgsd / naive loop ({naive:.1f} s)", _both(r["rgsd/naive"]), ""
    elif name == "p2_update":
        yield "P2: update phase / its matrix products", _both(r["update/products"]), "<= 1.5"
        yield "P2: divergence / its three matrix products", _both(r["divergence/products"]), "<= 1.3"
    elif name == "p3_memory":
        yield "P3: peak memory, divergence / full logits", f"{r['chunked/full']:.3f}", "<= 0.1"
        by_vocabulary = r["loss_mib"]["chunked, by vocabulary"]
        yield (
            "P3: MiB of the divergence, by vocabulary size",
            ", ".join(f"{int(v):,}: {m}" for v, m in by_vocabulary.items()),
            "flat",
        )
        step = r["step_mib"]
        yield (
            f"P3: peak memory of a step, rgsd / SDFT ({step['rgsd']:,} / {step['sdft']:,} MiB)",
            f"{r['step rgsd/sdft']:.2f}",
            "<= 0.5",
        )
    elif name == "p4_grpo":
        yield "P4: time per prompt, GRPO with 16 rollouts / rgsd", _both(r["grpo/rgsd"]), ">= 10"
    elif name == "p5_padding":
        for setting, found in r["results"].items():
            yield (
                f"P5: padding, {setting} micro-batches",
                f"{found['padded_share']:.1%} (unsorted {found['in_order']:.1%})",
                "<= 5 %",
            )
    elif name == "p6_rollouts":
        for setting, found in r["results"].items():
            rates = found["tokens_per_second"]
            yield (
                f"P6: decoding, {setting}, {rates['rgsd']:.0f} against {rates['transformers']:.0f} tokens/s",
                _both(found["faster"]),
                ">= 1.5",
            )


def _growth(result: dict[str, Any]) -> Iterator[str]:
    yield "| axis | values | CPU seconds | slope | MiB | slope |"
    yield "|---|---|---|---|---|---|"
    for axis, found in result["results"].items():
        points = found["points"]
        columns = (
            ", ".join(f"{p['at']:,}" for p in points),
            ", ".join(f"{p['cpu']:.2f}" for p in points),
            f"{found['slope']['cpu']:.2f}",
            ", ".join(f"{p['mib']:,}" for p in points),
            f"{found['slope']['mib']:.2f}",
        )
        yield f"| {axis} | {' | '.join(columns)} |"
    yield ""
    yield "![Step time and memory along each axis, on logarithmic scales](growth.svg)"


def plot(axes: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "rgsd"
    figure, panels = pyplot.subplots(1, len(axes), figsize=(3 * len(axes), 3), layout="constrained")
    for panel, (axis, found) in zip(panels, axes.items(), strict=True):
        at = [p["at"] for p in found["points"]]
        for kind, name, marker in (("cpu", "CPU s", "o"), ("mib", "GiB", "s")):
            scale = 1024 if kind == "mib" else 1
            label = f"{name}, slope {found['slope'][kind]:.2f}"
            panel.loglog(at, [p[kind] / scale for p in found["points"]], marker=marker, label=label)
        panel.set_xlabel(axis)
        panel.set_xticks(at, [f"{v:,}" for v in at], minor=False)
        panel.minorticks_off()
        panel.legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
