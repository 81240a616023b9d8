"""Which code made a figure: the commit it was checked out at, or the version of the project."""

import subprocess
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]


@lru_cache(maxsize=1)
def code_version() -> dict[str, Any]:
    """`commit` and whether tracked files are changed (`dirty`); outside a checkout of ours the `version`."""
    top = _git("rev-parse", "--show-toplevel")
    # Installed into a folder of somebody else's repository, its commit would say nothing of this code.
    if top is not None and Path(top).resolve() == PROJECT:
        commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
        if commit is not None and changed is not None:
            return {"commit": commit, "dirty": bool(changed)}
    try:
        text = (PROJECT / "pyproject.toml").read_text(encoding="utf-8")
        return {"version": tomllib.loads(text)["project"]["version"]}
    except (OSError, ValueError, KeyError):
        return {"version": "unknown"}


def _git(*words: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(PROJECT), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
