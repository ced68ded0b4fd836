"""`rgsd audit RUN[:ARM] [...]`: check stored responses for false claims, overclaims and padding."""

from __future__ import annotations

from rgsd.cli.parsing import Command, Positional, quieten

COMMAND = Command(
    name="audit",
    summary="check the stored responses of runs for false claims, overclaims and length",
    settings=("rgsd.evaluation.audits:AuditConfig", "rgsd.judges:JudgeConfig"),
    positionals=(Positional("run", "FOLDER (all of its arms) or FOLDER:ARM; lengths are relative to the first", "+"),),
    examples=("rgsd audit runs/mine --audits length", "rgsd audit runs/mine --judge openai/gpt-5.4"),
    details="`length` needs no judge; `claims` and `overclaim` need an LLM judge.",
)


def main(argv: list[str]) -> int:
    """Audit the stored responses; exit code 1 when the judge read too few of them."""
    parsed = COMMAND.parse(argv)
    quieten()
    from rgsd.evaluation.audits import audit, check_audit, show_audit

    settings, judge = parsed.settings
    findings = audit(parsed.positionals["run"], judge, settings)
    show_audit(findings)
    check_audit(findings, settings.min_coverage)
    return 0
