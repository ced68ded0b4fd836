"""`rgsd report` and `rgsd explain`: self-contained HTML pages about runs and about single responses.

`facts` reads run folders into numbers and sentences, `charts` draws SVG, `page` renders HTML, and `token_map` compares
teacher and student at each token of a response.
"""

from rgsd.report.facts import TOKEN_MAPS, Facts, RunFacts, read
from rgsd.report.page import report_page, token_page, write_page

__all__ = ["TOKEN_MAPS", "Facts", "RunFacts", "read", "report_page", "token_page", "write_page"]
