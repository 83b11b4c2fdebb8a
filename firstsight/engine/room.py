"""What is left of disk and memory: looked at before a run needs it, not when it has run out."""

from __future__ import annotations

import shutil
from pathlib import Path

from firstsight.errors import UserError

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def disk(folder: Path) -> int:
    """Bytes that can still be written into `folder`."""
    return shutil.disk_usage(folder).free


def require_disk(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what will not fit: `needed` bytes in `folder` for `what`."""
    free = disk(folder)
    if free < needed:
        raise UserError(
            f"{what} take {told(needed)} and {folder} has {told(free)} left; make room, keep fewer "
            f"with --keep, or use --out on another disk"
        )


def memory() -> int | None:
    """Bytes that processes can still get here, or in the container; None where nobody tells."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return None
    try:
        most = int((_CGROUP / "memory.max").read_text())
        held = int((_CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return min(free, most - held + int(stat["inactive_file"]))  # files can be let go
    except (OSError, KeyError, ValueError):  # no container, or one without a limit ("max")
        return free


def told(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
