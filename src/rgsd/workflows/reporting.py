"""The report that `rgsd train --report` writes at the end of a run."""

from __future__ import annotations

from rgsd.data.config import DataConfig
from rgsd.errors import RGSDError
from rgsd.progress import say
from rgsd.report import TOKEN_MAPS, read, report_page, write_page
from rgsd.report.token_map import ExplainConfig, explain
from rgsd.runs import REPORT, Run


def write_report(run: Run, *, trust_remote_code: bool = False) -> None:
    """Write RUN/report.html, with the token map of the first held-out prompt if it can be computed.

    Raises:
        RunError: If the page cannot be written.
    """
    if not run.read_lines(TOKEN_MAPS):
        say("Token map of one held-out prompt")
        try:
            explain(str(run.folder), None, DataConfig(), ExplainConfig(keep=True, trust_remote_code=trust_remote_code))
        except RGSDError as error:
            say(f"The report has no token map: {error}")
    write_page(run.folder / REPORT, report_page(read([str(run.folder)])), overwrite=True)
