"""`rgsd doctor`: check the installation and this machine."""

from __future__ import annotations

from rgsd.cli.parsing import Command

COMMAND = Command(
    name="doctor",
    summary="check packages, device, memory and keys, and say how to install what is missing",
    settings=("rgsd.workflows.doctor:DoctorConfig",),
    examples=("rgsd doctor", "rgsd doctor --json"),
    details="Prints whether API keys are set, never their values. Exits with code 1 when this machine cannot train.",
)


def main(argv: list[str]) -> int:
    """Print the state of this machine; exit code 1 when it cannot train."""
    (settings,) = COMMAND.parse(argv).settings
    import json

    from rgsd.workflows.doctor import examine, show

    state = examine()
    if settings.json:
        print(json.dumps(state, indent=2))
    else:
        show(state)
    return 0 if state["can_train"] else 1
