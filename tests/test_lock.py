"""requirements.lock: exact versions with hashes, no host, everything pyproject.toml asks for, safe floors."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = Path(__file__).resolve().parents[1]
LOCK = (PROJECT / "requirements.lock").read_text(encoding="utf-8")
PYPROJECT = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))
WANTED = [
    Requirement(text)
    for text in (*PYPROJECT["project"]["dependencies"], *PYPROJECT["dependency-groups"]["dev"])
]
PYTHONS = ("3.11", "3.12", "3.13")
#: Versions below these have known holes: malware, code run from a checkpoint, bombs in pictures.
FLOORS = {"lightning": "2.6.6", "torch": "2.11", "hydra-core": "1.3.8", "pillow": "12.3"}

_ENTRY = re.compile(
    r"(?P<requirement>[A-Za-z0-9][^\s;]*(?: ?; [^\\]+)?)"
    r"(?P<hashes>(?: \\\n    --hash=sha256:[0-9a-f]{64})+)\n"
)


def entries(lock: str) -> list[Requirement]:
    """The requirements of a lock.

    Raises:
        ValueError: a line that is neither a pinned requirement with SHA-256 hashes nor a comment.
    """
    requirements = []
    rest = "".join(line for line in lock.splitlines(keepends=True) if not line.lstrip().startswith("#"))
    while rest:
        match = _ENTRY.match(rest)
        if match is None:
            raise ValueError(f"not a pinned requirement with hashes: {rest.splitlines()[0]!r}")
        requirement = Requirement(match["requirement"].strip())
        if not re.fullmatch(r"==[^*,]+", str(requirement.specifier)) or requirement.url:
            raise ValueError(f"not pinned to one version: {requirement}")
        requirements.append(requirement)
        rest = rest[match.end() :]
    return requirements


def locked(name: str, python: str) -> list[Version]:
    """Versions of `name` that the lock installs on Linux with a version of Python."""
    environment = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
    environment |= {"platform_system": "Linux", "platform_machine": "x86_64", "os_name": "posix"}
    return [
        Version(next(iter(r.specifier)).version)
        for r in entries(LOCK)
        if canonicalize_name(r.name) == canonicalize_name(name)
        and (r.marker is None or r.marker.evaluate(environment))
    ]


def test_the_lock_names_no_host() -> None:
    assert "://" not in LOCK
    assert not re.search(r"(?m)^\s*-(?!-hash=)", LOCK)  # no --index-url, no -e


def test_every_line_is_pinned_and_hashed() -> None:
    assert len(entries(LOCK)) > 100


@pytest.mark.parametrize(
    "fault",
    [
        "thing==1.0\n",
        "thing>=1.0 \\\n    --hash=sha256:" + "0" * 64 + "\n",
        "thing==1.* \\\n    --hash=sha256:" + "0" * 64 + "\n",
        "thing==1.0 \\\n    --hash=md5:" + "0" * 32 + "\n",
        "thing==1.0 \\\n    --hash=sha256:" + "0" * 63 + "\n",
        "thing @ file:///thing.whl \\\n    --hash=sha256:" + "0" * 64 + "\n",
        "--index-url /somewhere\n",
        "-e .\n",
    ],
)
def test_a_planted_line_is_found(fault: str) -> None:
    with pytest.raises(ValueError, match="pinned"):
        entries(LOCK + fault)
    with pytest.raises(ValueError, match="pinned"):
        entries(fault + LOCK)


@pytest.mark.parametrize("wanted", WANTED, ids=lambda r: r.name)
def test_the_lock_covers_what_the_project_asks_for(wanted: Requirement) -> None:
    for python in PYTHONS:
        versions = locked(wanted.name, python)
        assert len(versions) == 1, f"{wanted.name} on Python {python}: {versions}; run make lock"
        assert versions[0] in wanted.specifier, f"locked {versions[0]} is not {wanted}; run make lock"


@pytest.mark.parametrize(("name", "floor"), FLOORS.items())
def test_floors_hold_in_the_ranges_and_in_the_lock(name: str, floor: str) -> None:
    wanted = next(r for r in WANTED if canonicalize_name(r.name) == name)
    below = Version(floor).release
    below = (*below[:-1], below[-1] - 1)
    assert ".".join(map(str, below)) not in wanted.specifier
    assert f"{'.'.join(map(str, below))}.99" not in wanted.specifier
    assert min(v for python in PYTHONS for v in locked(name, python)) >= Version(floor)


def test_torch_is_not_capped_into_a_wheel_without_a_gpu() -> None:
    wanted = next(r for r in WANTED if r.name == "torch")
    assert "2.14" in wanted.specifier
    assert "2.99" in wanted.specifier


def test_python_is_what_hydra_runs_on() -> None:
    assert PYPROJECT["project"]["requires-python"] == ">=3.11,<3.14"
