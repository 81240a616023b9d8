"""Do pictures show what their prompts say? Scorers give every picture figures; categories have their means.

A scorer is given pictures and prompts and no network that made them. Where a prompt does not state what is
scored, the figure is NaN and counts nowhere. A detector's rule, such as GenEval's, fits the same interface.

    scores = AdherenceScorer(judge).score(pictures, prompts)
    category_means(scores, prompts)["sunset"]["all"]
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.landscapes import FACTORS, read_factors
from evaluation.adherence import AdherenceJudge
from evaluation.features import check_pictures
from evaluation.prompts import Prompt, by_category
from models.portions import Portions

#: A picture uint8 `[3 H W]` and a question in English -> whether the answer is yes.
Answerer = Callable[[Tensor, str], bool]
_ROWS = 32


class Scorer(ABC):
    """Gives figures to pictures of prompts."""

    @abstractmethod
    def score(self, pictures: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        """Name -> float64 `[N]`, more is better, NaN where a prompt says nothing of it.

        `pictures` uint8 `[N 3 H W]`, one for each of the N `prompts`. Raises ValueError where their numbers
        differ.
        """


class AdherenceScorer(Scorer):
    """Whether the landscapes judge reads from a picture what its prompt states: 1 or 0.

    `time`, `terrain`, `light`, `sky`, and `all` that the prompt states. They are taken from the prompt's
    record, or read from its text.
    """

    def __init__(self, judge: AdherenceJudge) -> None:
        self.judge = judge
        self.portions = Portions()

    def score(self, pictures: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        _check(pictures, prompts)
        seen = self.portions(_ROWS, self._read, pictures)
        scores = {name: np.full(len(prompts), np.nan) for name in (*FACTORS, "all")}
        for k, prompt in enumerate(prompts):
            wanted = stated_factors(prompt)
            for column, (name, members) in enumerate(FACTORS.items()):
                if name in wanted:
                    scores[name][k] = list(members)[int(seen[k, column])].value == wanted[name]
            if wanted:
                scores["all"][k] = min(scores[name][k] for name in wanted)
        return scores

    def _read(self, pictures: Tensor) -> Tensor:
        """Class numbers `[B 4]`."""
        return torch.stack(list(self.judge.predict(pictures.float() / 127.5 - 1).values()), 1)


def stated_factors(prompt: Prompt) -> dict[str, str]:
    """The factors of a landscape that a prompt states, by its record or else by its text."""
    known = {
        name: str(prompt.record[name])
        for name, members in FACTORS.items()
        if prompt.record.get(name) in [member.value for member in members]
    }
    return known or read_factors(prompt.text)


class QuestionScorer(Scorer):
    """The share in [0, 1] of a prompt's questions that are answered with yes: `questions`.

    A question counts as no where one that it depends on is (Cho et al. 2024, arXiv 2310.18235, section 3):
    there is no red car where there is no car. Questions are those of DSG's files; prompts of others have NaN.
    """

    def __init__(self, answer: Answerer) -> None:
        self.answer = answer

    def score(self, pictures: Tensor, prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        _check(pictures, prompts)
        shares = [self._share(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
        return {"questions": np.array(shares)}

    def _share(self, picture: Tensor, prompt: Prompt) -> float:
        questions = {each["id"]: each for each in prompt.record.get("questions", ())}
        if not questions:
            return float("nan")
        answers: dict[str, bool] = {}

        def answered(name: str) -> bool:
            if name not in answers:
                answers[name] = self.answer(picture, questions[name]["question"])
            return answers[name]

        # Parents come first, so that nothing is asked of what is not there.
        held = [all(answered(each) for each in _with_ancestors(name, questions)) for name in questions]
        return sum(held) / len(questions)


def _with_ancestors(name: str, questions: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """All that a question depends on and that is there, parents first, and itself at the end."""
    order: list[str] = []
    entered: set[str] = set()

    def enter(each: str) -> None:
        if each in questions and each not in entered:
            entered.add(each)
            for parent in questions[each]["parents"]:
                enter(parent)
            order.append(each)

    enter(name)
    return order


def category_means(
    scores: Mapping[str, np.ndarray], prompts: Sequence[Prompt]
) -> dict[str, dict[str, float]]:
    """Category -> name -> the mean over its prompts that state what is scored; left out where none does."""
    means: dict[str, dict[str, float]] = {}
    for category, numbers in by_category(prompts).items():
        chosen = {name: values[numbers] for name, values in scores.items()}
        means[category] = {
            name: float(np.nanmean(values)) for name, values in chosen.items() if not np.isnan(values).all()
        }
    return means


def _check(pictures: Tensor, prompts: Sequence[Prompt]) -> None:
    check_pictures(pictures)
    if len(pictures) != len(prompts) or not prompts:
        raise ValueError(f"score: {len(pictures)} pictures for {len(prompts)} prompts; give one for each")
