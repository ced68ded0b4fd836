"""`rgsd audit RUN [RUN:ARM ...] --judge J`: false claims, overclaims, longer responses."""

from __future__ import annotations

USAGE = """usage: rgsd audit RUN[:ARM] [...] [--audits length,claims,overclaim] [--judge J] [--FIELD VALUE ...]

Looks at the stored responses of runs of `rgsd train`, `grpo` or `eval`; lengths are compared with the first arm's.
Without ARM, all arms of the run. `length` needs no judge; `claims` and `overclaim` need an LLM judge.
"""


def main(argv: list[str]) -> int:
    """Audit the stored responses of runs."""
    from rgsd.cli.train import parse_plain, quieten, split_names
    from rgsd.evaluation.audits import AuditConfig, audit, check_audit, show_audit
    from rgsd.judges import JudgeConfig

    names, flags = split_names(argv)
    if "--help" in flags or "-h" in flags:
        print(USAGE)
    elif not names:
        print(USAGE)
        return 2
    quieten()
    judge, settings = parse_plain((JudgeConfig, AuditConfig), flags, "audit")
    found = audit(names, judge, settings)
    show_audit(found)
    check_audit(found, settings.min_coverage)
    return 0
