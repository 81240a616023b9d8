"""What the Dockerfile, SkyPilot's file and the pages on launching name is there: files, keys, options."""

import re
import shlex
from pathlib import Path

import hydra
import pytest
import yaml
from torch.distributed.run import get_args_parser

from conf.cli import FOLDER
from conf.schema import register

PROJECT = Path(__file__).resolve().parents[1]
PAGES = ("docs/launch.md", "docs/scaling.md")
FILE = re.compile(r"(?<![\w./-])(?:docs|scripts|conf|tests|models)/[\w./-]*\w|\b(?:train|sample)\.py\b")


def commands(text: str) -> list[list[str]]:
    """The words of every command in `text` that has train.py in it, code in backticks or blocks alone."""
    joined = text.replace("\\\n", " ")
    lines = [span for span in re.findall(r"`([^`\n]+)`", joined) if "train.py " in span]
    lines += [line for line in joined.splitlines() if "train.py " in line and "`" not in line]
    return [shlex.split(line, comments=True) for line in lines]


def refused(words: list[str]) -> str:
    """Why a command would be refused; empty if it would not be."""
    entry = words.index("train.py")
    if "torchrun" in words[0]:
        parser = get_args_parser()
        known = {option for action in parser._actions for option in action.option_strings}
        unknown = [w for w in words[1:entry] if w.split("=")[0] not in known]
        if unknown:
            return f"torchrun has no {unknown}"
    overrides = [word for word in words[entry + 1 :] if "=" in word and word.split("=")[0] not in ALIASES]
    register()
    try:
        with hydra.initialize_config_dir(str(FOLDER), version_base="1.3"):
            hydra.compose("train", overrides=overrides)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


#: Short words of the command line that train.py itself puts into keys.
ALIASES = {"plan", "devices"}


def sky() -> dict[str, object]:
    return dict(yaml.safe_load((PROJECT / "docs/skypilot.yaml").read_text(encoding="utf-8")))


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_pages_compose_and_files_exist(page: str) -> None:
    text = (PROJECT / page).read_text(encoding="utf-8")
    found = commands(text)
    assert len(found) >= 2
    assert [(words, why) for words in found if (why := refused(words))] == []
    assert [name for name in FILE.findall(text) if not (PROJECT / name).exists()] == []


@pytest.mark.parametrize(
    "line",
    [
        "python train.py trainer.device=8",
        "torchrun --node-rnk=0 train.py seed=1",
        "python train.py launcher=pbs",
    ],
)
def test_a_wrong_command_would_be_found(line: str) -> None:
    assert refused(commands(f"```\n{line}\n```")[0])


def test_skypilot() -> None:
    document = sky()
    assert set(document) <= {
        "name",
        "num_nodes",
        "resources",
        "workdir",
        "file_mounts",
        "envs",
        "setup",
        "run",
    }
    setup, run = str(document["setup"]), str(document["run"])
    assert all((PROJECT / name).exists() for name in [*FILE.findall(setup), "requirements.lock"])
    (words,) = (command[1:] for command in commands(run))  # without exec
    assert refused(words) == ""


def test_dockerfile_copies_what_is_there_and_nothing_else_reaches_it() -> None:
    lines = (PROJECT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    copied = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    assert [name for name in copied if not (PROJECT / name).exists()] == []
    packages = {path.parent.name for path in PROJECT.glob("*/__init__.py")} - {"tests"}
    assert packages <= set(copied)
    ignored = (PROJECT / ".dockerignore").read_text(encoding="utf-8").split()
    assert {word[1:] for word in ignored if word.startswith("!")} == set(copied)
    assert "*" in ignored
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert users
    assert users[-1] not in ("root", "0")
    assert any("--require-hashes -r requirements.lock" in line for line in lines)
