"""Lets accelerate choose FSDP2 on CPUs in launched processes (`processes.fsdp_on_cpus`)."""

import os
import sys
from pathlib import Path

if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    sys.path.append(str(Path(__file__).parents[2]))
    from support.processes import fsdp_on_cpus

    fsdp_on_cpus()
