"""The kind of machine this is, never its name. Like `kshot_errors` it stands below all packages."""

import platform
from pathlib import Path


def processor() -> str:
    """The model of the processor where the system says it, else its family."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor())
