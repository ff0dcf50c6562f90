"""`gradscope demo`, run once for all that look at what it leaves."""

import fcntl
import subprocess
import sys
from pathlib import Path
from typing import TypeAlias

import pytest

# Its folder, and what it printed.
Demo: TypeAlias = tuple[Path, str]


def demo_once(folders: pytest.TempPathFactory) -> Demo:
    """Workers of pytest that want the same wait for the one that was first."""
    base = folders.getbasetemp()
    shared = base.parent if base.name.startswith("popen-") else base
    folder, printed = shared / "demo", shared / "demo.printed"
    with (shared / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            done = subprocess.run(
                [sys.executable, "-W", "error", "-m", "gradscope", "demo", "-o", str(folder)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stderr
            printed.write_text(done.stdout, encoding="utf-8")
    return folder, printed.read_text(encoding="utf-8")


def runs_of(demo: Demo) -> list[Path]:
    """The folders of its runs, by name."""
    return sorted(path for path in demo[0].iterdir() if path.is_dir())
