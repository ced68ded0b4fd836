"""`rgsd doctor`: what is installed, which device, what is missing and how to get it."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Print what this machine has; exit code 1 when rgsd could not train on it."""
    parser = argparse.ArgumentParser(
        prog="rgsd doctor",
        description="What is installed, which device, what is missing and how to get it. Keys are never printed.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="everything as JSON")
    args = parser.parse_args(argv)
    import json

    from rgsd.workflows.doctor import examine

    found = examine()
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _show(found)
    return 0 if found["can_train"] else 1


def _show(found: dict) -> None:
    device, memory, embedded = found["device"], found["memory"], found["embedded_model"]
    print(
        f"rgsd      {found['rgsd'] or 'not installed: run from its source'}, Python {found['python']}, "
        f"{found['platform']}"
    )
    print(f"device    {device['kind']}: {', '.join(device['names']) or 'none'}, {device['cores']} cores")
    for name, (free, total) in zip(device["names"], device.get("memory_free_and_total_gib", ()), strict=False):
        print(f"          {name}: {free} of {total} GiB free")
    if memory["total_gib"] is not None:
        print(
            f"memory    {memory['available_gib']} of {memory['total_gib']} GiB free; "
            f"disk {memory['disk_free_gib']} GiB free"
        )
    print(f"packages  {', '.join(_version(p) for p in found['packages'])}")
    have = [name for name, packages in found["extras"].items() if packages and all(p["is_ok"] for p in packages)]
    print(f"extras    {', '.join(have) or 'none'}")
    print(f"embedded  {', '.join(name for name, is_there in embedded.items() if is_there) or 'not installed'}")
    print(f"hub       {'reachable' if found['hub']['is_reachable'] else 'not reachable'} ({found['hub']['why']})")
    print(f"keys      {', '.join(f'{name} {_set(is_set)}' for name, is_set in found['keys'].items())}")
    if found["missing"]:
        print("\nMissing, each with how to get it:")
        for one in found["missing"]:
            print(f"  {one['what']}: {one['why']}\n      {one['how']}")
    print("\nReady to train." if found["can_train"] else "\nNot ready to train: see what is missing.")


def _version(package: dict) -> str:
    return f"{package['name']} {package['installed'] or 'MISSING'}{'' if package['is_ok'] else ' (!)'}"


def _set(is_set: bool) -> str:
    return "set" if is_set else "not set"
