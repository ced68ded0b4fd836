"""Faster ways to compute the same on a CPU: packed linear layers, cheap sampling, a decode loop of our own.

Each is held to the plain path by the tests, applies only where it is known to be right, and says so otherwise by
leaving the work to torch and transformers. RGSD_FAST=0 in the environment switches all of it off.
"""

from __future__ import annotations

import os


def is_on() -> bool:
    """Whether the fast paths may be taken: yes, unless RGSD_FAST is 0, false, no or off."""
    return os.environ.get("RGSD_FAST", "1").strip().lower() not in ("0", "false", "no", "off")
