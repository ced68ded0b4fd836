"""`rgsd report`: run folders -> one HTML page that holds everything it shows and loads nothing."""

from rgsd.report.facts import TOKEN_MAPS, Facts, RunFacts, read
from rgsd.report.page import report_page, token_page, write_page

__all__ = ["TOKEN_MAPS", "Facts", "RunFacts", "read", "report_page", "token_page", "write_page"]
