"""From the command line to a function, and from any error to one clear line and an exit code.

2 usage or configuration, 3 data, 4 checkpoint, 5 environment, 6 numerical, 130 interrupted, 143 terminated.
`debug=true` shows the traceback as well.
"""

import functools
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from conf.schema import plain, register
from data.index import DataError
from data.loader import WorkerError
from evaluation.adherence import JudgeError
from models.checkpoint import CheckpointError
from models.registry import ConfigError, did_you_mean
from models.stages.signals import Stopped

FOLDER = Path(__file__).parent
#: Keys whose values are taken to the letter.
_TEXTS = ("prompt", "negative_prompt", "other_prompt", "watermark", "data.where")
#: Short words of a command for its keys: `plan` is a group, so that it cannot be a switch as well.
_SHORT = {"train": {"plan": "estimate", "devices": "trainer.devices"}}
#: What goes on after an interruption.
_AGAIN = {"train": "resume=true", "sample": "the same command", "evaluate": "the same command"}
_AGAIN |= {"sweep": "the same command"}

EXIT_CODES: list[tuple[type[BaseException], int]] = [
    (ConfigError, 2),
    (HydraException, 2),
    (OmegaConfBaseException, 2),
    (DataError, 3),
    (CheckpointError, 4),
    (JudgeError, 4),
    (OSError, 5),
    (ImportError, 5),
    (WorkerError, 5),
    (FloatingPointError, 6),
    (KeyboardInterrupt, 130),
]


class Terminated(BaseException):
    """SIGTERM arrived."""


def main(name: str, function: Callable[[DictConfig], None]) -> None:
    """Runs `function` with the configuration `<name>.yaml` composed with the command line, and exits.

    Args:
        name: of the configuration file.
        function: gets the composed configuration.
    """
    register()
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # "save now" means something in training only
    # Hydra would print and exit with 1 by itself; with this set it raises instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    failures: list[Exception] = []

    @functools.wraps(function)
    def job(config: DictConfig) -> None:
        try:
            function(config)
        except Exception as error:  # Hydra would print a line of its own about it
            failures.append(error)

    debug = any(word in ("debug=true", "debug=True") for word in sys.argv[1:])
    try:
        _refuse_targets(sys.argv[1:])
        sys.argv[1:] = [quoted(spelt_out(word, name)) for word in sys.argv[1:]]
        _compose_and_run(name, job)
        if failures:
            raise failures[0]
    except Terminated:
        sys.exit(143)
    except Stopped as stop:
        if _is_first():
            print(f"{name}.py: stopped and saved; continue with resume=true", file=sys.stderr, flush=True)
        # All is saved: another signal on the way out must not change the exit code.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        sys.exit(stop.code)
    except BaseException as error:
        code = next((code for kind, code in EXIT_CODES if isinstance(error, kind)), None)
        if code is None:
            raise
        if debug:
            traceback.print_exc()
        # What every rank meets alike is said once; what befell one of them it says itself.
        if _is_first() or not isinstance(error, (ConfigError, CheckpointError, FloatingPointError)):
            rank = "" if _is_first() else f"rank {os.environ['RANK']}: "
            print(f"{name}.py: {rank}{explain(error, name)}", file=sys.stderr, flush=True)
        sys.exit(code)


def _compose_and_run(name: str, job: Callable[[DictConfig], None]) -> None:
    """Runs `job`; whatever Hydra raises while it composes is a mistake in the command.

    `hydra.main` composes everything twice, at first for `hydra.mode` alone: half a second that only a command
    with options of Hydra's waits for.
    """
    try:
        if any(re.match(r"-|[+~]*hydra\b", word) for word in sys.argv[1:]):
            hydra.main(version_base="1.3", config_path=str(FOLDER), config_name=name)(job)()
        else:
            job(_configuration(name, sys.argv[1:]))
    except (HydraException, OmegaConfBaseException):
        raise
    except Exception as error:
        raise ConfigError(str(error)) from error


def _configuration(name: str, words: list[str]) -> DictConfig:
    """The configuration `name` with the overrides `words`; what Hydra says of it is in `HydraConfig`."""
    with hydra.initialize_config_dir(str(FOLDER), job_name=name, version_base="1.3"):
        config = hydra.compose(name, words, return_hydra_config=True)
    HydraConfig.instance().set_config(config)
    configure_log(config.hydra.job_logging, config.hydra.verbose)
    with open_dict(config):
        del config["hydra"]
    return config


def explain(error: BaseException, name: str) -> str:
    """One line: what is wrong and, for a misspelt word of the configuration `name`, what was meant."""
    while isinstance(error, HydraException) and error.__cause__ is not None:
        error = error.__cause__  # Hydra's own message only says which override could not be merged
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return f"interrupted; continue with {_AGAIN[name]}"
    if isinstance(error, OSError) and error.strerror:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}; check that the path exists, is writable and has space"
    stray = re.search(r"Error parsing override '([^']*)'\s*missing EQUAL", text)
    if stray:
        return (
            f"'{stray.group(1)}' is no key=value; quote values that hold spaces, as prompt=\"a sea at dawn\""
        )
    option = re.search(r"Could not find '([\w/]+)/([\w.-]*)'", text)
    if option:
        group, word = option.groups()
        return f"there is no {group}={word}{did_you_mean(word, _choices(group))}"
    override = re.search(r"Could not override '([^']+)'", text)
    key = override or re.search(r"full_key: (\S+)", text)
    unknown = override or re.search(r"Key '([^']+)' (?:is )?not in", text)
    if unknown and key:
        return f"there is no key '{key.group(1)}'{did_you_mean(key.group(1), _keys(name))}"
    value = re.search(r"(Value|Invalid value) .*?(?= full_key)", text)
    if value and key:
        return f"{key.group(1)}: {value.group(0)}"
    return text


def quoted(word: str) -> str:
    """An override of a text in words, quoted, so that Hydra takes commas, brackets and > as they are.

    A list, and a text that is quoted already, stay.
    """
    key, equals, text = word.partition("=")
    if key not in _TEXTS or not equals or text[:1] in ("[", "'", '"'):
        return word
    # Inside quotes Hydra reads a backslash as itself, except before a quote and at the end.
    escaped = re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), text)
    escaped = escaped.replace("${", "\\${")
    return f"{key}='{escaped}'"


def spelt_out(word: str, name: str) -> str:
    """An override of the configuration `name` with the key that a short word stands for."""
    key, equals, value = word.partition("=")
    return f"{_SHORT.get(name, {}).get(key, key)}{equals}{value}"


def _refuse_targets(words: list[str]) -> None:
    """A `_target_` would name code to run; nothing here ever runs one, and asking for it is a mistake."""
    for word in words:
        if "_target_" in word.split("=", 1)[0]:
            raise ConfigError(f"{word}: _target_ is not accepted; parts are chosen by name, as backbone=tiny")


def composed(name: str, *words: str) -> dict[str, Any]:
    """What the command `name` would be given with the overrides `words`, as plain values."""
    register()
    with hydra.initialize_config_dir(str(FOLDER), version_base="1.3"):
        return plain(hydra.compose(name, list(words)))


def _choices(group: str) -> list[str]:
    files = [path.stem for path in (FOLDER / group).glob("*.yaml")]
    try:
        return files + [str(n).removesuffix(".yaml") for n in ConfigStore.instance().list(group)]
    except OSError:
        return files


def _keys(name: str) -> list[str]:
    """Every dotted key of the default configuration, and the names of the groups."""
    with hydra.initialize_config_dir(str(FOLDER), version_base="1.3"):
        config = hydra.compose(name)
    found = [path.name for path in FOLDER.iterdir() if path.is_dir()]

    def walk(node: object, prefix: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                found.append(f"{prefix}{key}")
                walk(value, f"{prefix}{key}.")

    walk(OmegaConf.to_container(config, throw_on_missing=False), "")
    return found


def _is_first() -> bool:
    """Whether this process says what all ranks have to say."""
    return os.environ.get("RANK", "0") == "0"


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
