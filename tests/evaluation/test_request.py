"""What is asked for in words of `sample.py`: one set of defaults, parts by name as a command has them."""

from dataclasses import asdict

import pytest
from hydra import compose, initialize_config_dir

from conf.cli import FOLDER
from conf.schema import SampleConfig, plain, register
from evaluation.request import DEFAULTS, part
from models.registry import REGISTRY, ConfigError


def test_the_defaults_are_those_of_the_command() -> None:
    command = asdict(SampleConfig())
    assert {key: command[key] for key in DEFAULTS} == DEFAULTS


@pytest.mark.parametrize("group", ["sampler", "grid", "guidance"])
def test_a_part_by_its_name_is_what_a_command_composes(group: str) -> None:
    register()
    for name in REGISTRY[group]:
        with initialize_config_dir(str(FOLDER), version_base="1.3"):
            composed = plain(compose("sample", [f"{group}={name}"]))[group]
        assert part(group, name) == composed
    with pytest.raises(ConfigError, match=f"{group}: there is no 'nothing'"):
        part(group, "nothing")
