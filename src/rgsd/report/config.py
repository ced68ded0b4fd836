"""Settings of `rgsd report`."""

from __future__ import annotations

from dataclasses import dataclass

from rgsd.settings import setting


@dataclass
class ReportConfig:
    """Where the report goes."""

    output: str | None = setting(
        None, "File for the page, or a .json file for the numbers alone. Unset: RUN/report.html.", aliases=["-o"]
    )
