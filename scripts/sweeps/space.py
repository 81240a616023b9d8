"""What a sweep varies: keys of train.py, each with a range or choices.

    optimizer.diffusion.lr: {low: 3e-4, high: 6e-3, log: true}
    plan.diffusion.batch_size: {low: 16, high: 64, step: 16}
    objective: {choices: [flow, v_cosine]}

A range of whole numbers is one of integers, any other one of floats.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from optuna import Trial
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from models.registry import ConfigError, did_you_mean

_RANGE, _CHOICES = ("low", "high", "log", "step"), ("choices",)


class Space:
    """The keys that are varied, and how.

    Args:
        described: key -> range or choices, as a sweep's file holds them.

    Raises:
        ConfigError: nothing, or something else than a range or choices.
    """

    def __init__(self, described: Mapping[str, Any]) -> None:
        if not described:
            raise ConfigError("space is empty; name at least one key of train.py, with a range or choices")
        self.described = {str(key): dict(_checked(str(key), value)) for key, value in described.items()}
        self.distributions = {key: _distribution(key, value) for key, value in self.described.items()}

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """The value of each key in `trial`: those it has, and new ones for the rest."""
        return {key: _suggest(trial, key, each) for key, each in self.distributions.items()}

    def grid(self) -> list[dict[str, Any]]:
        """Every combination, the first key changing slowest.

        Raises:
            ConfigError: a range without a step, which has no end of values.
        """
        columns = [_values(key, each) for key, each in self.distributions.items()]
        return [dict(zip(self.distributions, row, strict=True)) for row in itertools.product(*columns)]


def words_of(params: Mapping[str, Any]) -> list[str]:
    """The overrides of train.py that set `params`; a float is written so that it is read back to the bit."""
    return [f"{key}={_word(value)}" for key, value in params.items()]


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return repr(value) if isinstance(value, float) else "null" if value is None else str(value)


def _checked(key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"space.{key} is {value!r}; give {{low: ..., high: ...}} or {{choices: [...]}}")
    known = _CHOICES if "choices" in value else _RANGE
    for word in value:
        if word not in known:
            raise ConfigError(f"space.{key} has no '{word}'{did_you_mean(str(word), known)}")
    return value


def _distribution(key: str, value: Mapping[str, Any]) -> BaseDistribution:
    try:
        if "choices" in value:
            return CategoricalDistribution(list(value["choices"]))
        low, high, log, step = value["low"], value["high"], bool(value.get("log", False)), value.get("step")
        if all(isinstance(each, int) and not isinstance(each, bool) for each in (low, high, step or 1)):
            return IntDistribution(low, high, log, 1 if step is None else step)
        return FloatDistribution(float(low), float(high), log, None if step is None else float(step))
    except KeyError as error:
        raise ConfigError(f"space.{key} has no {error}; give low and high, or choices") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"space.{key}: {error}") from None


def _suggest(trial: Trial, key: str, how: BaseDistribution) -> Any:
    if isinstance(how, CategoricalDistribution):
        return trial.suggest_categorical(key, how.choices)
    if isinstance(how, IntDistribution):
        return trial.suggest_int(key, how.low, how.high, step=how.step, log=how.log)
    assert isinstance(how, FloatDistribution)
    return trial.suggest_float(key, how.low, how.high, step=how.step, log=how.log)


def _values(key: str, how: BaseDistribution) -> Sequence[Any]:
    if isinstance(how, CategoricalDistribution):
        return list(how.choices)
    assert isinstance(how, IntDistribution | FloatDistribution)
    if how.step is None or how.log:
        raise ConfigError(f"space.{key} has no step, and a grid needs one; give step or choices")
    return [how.low + k * how.step for k in range(round((how.high - how.low) / how.step) + 1)]
