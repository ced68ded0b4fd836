"""Faster CPU code: packed linear layers, sampling, and a decode loop.

Each fast path is tested against the plain one, and applies only where it is known to be correct; torch and transformers
do the rest. RGSD_FAST=0 in the environment disables all of them.
"""

from __future__ import annotations

import os


def is_on() -> bool:
    """Whether the fast paths are enabled: RGSD_FAST is not 0, false, no or off."""
    return os.environ.get("RGSD_FAST", "1").strip().lower() not in ("0", "false", "no", "off")
