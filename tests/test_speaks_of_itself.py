"""The project names no machine that it was written on: no paths of one, no host but public references.

The patterns are written so that they do not match this file.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
#: What a checkout may hold that is not part of the project, where git is not there to ask.
NOT_OURS = {"__pycache__", "runs", "shards", "multirun", "outputs", "wandb", "uv.lock", "pylock.toml"}

MACHINE_PATH = re.compile(r"(?<![\w.~}/-])/(?:work|root|home|Users|mnt|workspace)/(?=[\w.])")
REGISTRY = re.compile(r"://(?:[\w-]+\.)*(?:files|registry|index|mirrors?|simple|pypi|artifactory|nexus)[.:/]")
INDEX_PATH = re.compile(r"/simp[l]e/")
HOST = re.compile(r"\bhttps?://([\w.-]+)", re.ASCII)
#: Papers, licences, and the documentation and public repositories of what the project builds on.
REFERENCES = (
    *("arxiv.org", "doi.org", "openreview.net", "w3.org", "ietf.org", "unicode.org", "semver.org"),
    *("apache.org", "creativecommons.org", "opensource.org", "spdx.org", "keepachangelog.com"),
    *("readthedocs.io", "github.com", "github.io", "pytorch.org", "python.org", "hydra.cc", "lightning.ai"),
    *("huggingface.co", "wandb.ai", "docs.astral.sh", "pre-commit.com", "iptc.org"),
)
#: Names kept for examples (RFC 2606) and for this machine itself.
EXAMPLES = ("example.com", "example.org", "example.net", "localhost", "127.0.0.1", "0.0.0.0", "host", "x")


def project_files() -> list[Path]:
    """Every file that is or would be part of the repository."""
    command = ["git", "-C", str(PROJECT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
        return [p for name in listed.split("\0") if name and (p := PROJECT / name).is_file()]
    except (OSError, subprocess.SubprocessError):
        return list(_walk())


def _walk() -> Iterator[Path]:
    for folder, folders, names in os.walk(PROJECT):
        folders[:] = [f for f in folders if f not in NOT_OURS and (f == ".ci" or not f.startswith("."))]
        yield from (
            Path(folder) / name for name in names if name not in NOT_OURS and not name.endswith(".pyc")
        )


def leaks(text: str) -> list[str]:
    """`line: what` for all that names a machine, a registry or an unknown host."""
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        for pattern in (MACHINE_PATH, REGISTRY, INDEX_PATH):
            found += [f"{number}: {match[0]}" for match in pattern.finditer(line)]
        found += [f"{number}: {match[0]}" for match in HOST.finditer(line) if not _is_reference(match[1])]
    return found


def _is_reference(host: str) -> bool:
    return host in EXAMPLES or any(host == name or host.endswith(f".{name}") for name in REFERENCES)


def test_no_file_names_a_machine() -> None:
    files = project_files()
    assert len(files) > 50
    found = []
    for path in files:
        content = path.read_bytes()
        if b"\0" not in content:
            text = content.decode("utf-8", errors="strict")
            found += [f"{path.relative_to(PROJECT)}:{leak}" for leak in leaks(text)]
    assert found == []


def test_nothing_is_listed_that_was_made_by_running() -> None:
    names = [path.relative_to(PROJECT).parts for path in project_files()]
    assert [parts for parts in names if NOT_OURS & set(parts) or ".venv" in parts] == []


@pytest.mark.parametrize(
    "parts",
    [
        ("see /", "work/main/train.py"),
        ("'/", "root/.cache'"),
        ("/", "home/someone/data"),
        ("(/", "Users/me/x)"),
        ("--index-url https:/", "/files.somewhere.net/x"),
        ("https:/", "/registry.corp/x"),
        ("http:/", "/mirror.corp.example.com/x"),
        ("https:/", "/pypi.org/x"),
        ("/sim", "ple/"),
        ("https:/", "/some.where.io/x"),
        ("http:/", "/10.0.0.1:8080"),
        ("https:/", "/notgithub.com/x"),
    ],
)
def test_a_planted_leak_is_found(parts: tuple[str, str]) -> None:
    assert leaks("a line\n" + "".join(parts) + "\n")[0].startswith("2: ")


@pytest.mark.parametrize(
    "line",
    [
        "Kingma 2013, https://arxiv.org/abs/1312.6114",
        "http://www.apache.org/licenses/LICENSE-2.0",
        "https://docs.pytorch.org/docs/stable",
        "http://127.0.0.1:8000/",
        "data.shards=/data/shards/train-{000000..000099}.tar",
        "s3://bucket/shards, file:///data/x.tar",
        "frame/workshop/homely/x and ~/homely/x",
    ],
)
def test_references_and_examples_are_none(line: str) -> None:
    assert leaks(line) == []
