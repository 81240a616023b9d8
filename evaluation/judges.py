"""What looks at the pictures of an evaluation: a feature network, and a scorer of what was asked for.

Networks of our own are trained where they are missing, on renders or on the run's training pictures, and kept
for the next evaluation; all others are read from a local file.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.progress import Progress
from evaluation.adherence import AdherenceJudge
from evaluation.asks import Real
from evaluation.classifier import (
    Classifier,
    ClassifierScorer,
    labels_of,
    load_classifier,
    save_classifier,
    train_classifier,
)
from evaluation.clip import load_clip
from evaluation.features import FeatureNetwork, judge_features, open_features
from evaluation.report import find_judge
from evaluation.retrieval import ClipTower, TextImageTower, TowerScorer
from evaluation.scorers import AdherenceScorer, Scorer
from evaluation.tower import SmallTower, load_tower, save_tower, train_tower
from models.checkpoint import CheckpointError
from models.registry import ConfigError, did_you_mean

#: Who tells whether a picture shows its prompt; "clip" with a model of `open_clip`, as clip:ViT-B-32.
SCORERS = ("auto", "judge", "tower", "classifier", "clip", "none")
_STEPS, _CLASSIFIER_STEPS = 600, 500


@dataclass(frozen=True)
class Judges:
    """The networks of one evaluation; `described` is the card's words for them.

    Args:
        network: whose features are compared.
        scorer: of pictures and prompts; None scores nothing.
        tower: that the scorer asks, where it is one that embeds texts and pictures.
        described: names and hashes.
    """

    network: FeatureNetwork
    scorer: Scorer | None
    tower: TextImageTower | None
    described: dict[str, Any]


def open_judges(
    features: str,
    features_file: str | None,
    scorer: str,
    scorer_file: str | None,
    folder: Path,
    judge: Path | None,
    train: Real,
) -> Judges:
    """The networks that are asked for.

    Args:
        features: "judge", or another name that `evaluation.features` knows, with its `features_file`.
        features_file: see `features`.
        scorer: one of `SCORERS`; "auto" is the judge for landscapes and the tower for all else.
        scorer_file: the weights of a clip.
        folder: where networks of our own are kept.
        judge: the judge's folder; None is `judge` in `folder`.
        train: training pictures, which the tower or the classifier is trained on.

    Raises:
        ConfigError: an unknown name, or pictures without classes to tell apart.
        CheckpointError: a file that cannot be read.
    """
    scorer, _, model = scorer.partition(":")
    if scorer not in SCORERS or bool(model) != (scorer == "clip"):
        raise ConfigError(
            f"scorer is '{scorer}', but must be auto, judge, tower, classifier, none, or clip with a "
            f"model, such as clip:ViT-B-32{did_you_mean(scorer, SCORERS)}"
        )
    if (scorer_file is None) == (scorer == "clip"):
        raise ConfigError("scorer_file is the weights of scorer=clip:MODEL; give both, or neither")
    if scorer == "auto":
        scorer = "judge" if train.is_landscapes else "tower"
    landscapes = find_judge(judge or folder / "judge") if "judge" in (features, scorer) else None
    network = _network(features, features_file, landscapes)
    described: dict[str, Any] = {
        "features": network.name, "features_sha256": network.sha256, "resize": network.resize
    }  # fmt: skip
    if scorer == "none":
        return Judges(network, None, None, described)
    if landscapes is not None and scorer == "judge":
        described |= {"scorer": "judge", "scorer_sha256": judge_features(landscapes).sha256}
        return Judges(network, AdherenceScorer(landscapes), None, described)
    if scorer == "classifier":
        classifier = find_classifier(folder / f"classifier-{train.sha256[:8]}", train)
        card = classifier.card
        described |= {"scorer": "classifier", "scorer_sha256": classifier.sha256}
        described |= {"scorer_classes": len(card.classes), "scorer_held_out": card.held_out}
        return Judges(network, ClassifierScorer(classifier, train.asks), None, described)
    tower = _tower(model, scorer_file, folder, train)
    described |= {"scorer": tower.name, "scorer_sha256": tower.sha256}
    return Judges(network, TowerScorer(tower), tower, described)


def _tower(model: str, file: str | None, folder: Path, train: Real) -> TextImageTower:
    """CLIP's `model` from its file, or the small tower of the training pictures where there is no file."""
    if file is None:
        return find_tower(folder / f"tower-{train.sha256[:8]}", train)
    try:
        return ClipTower(load_clip(model, Path(file)))
    except ValueError as error:
        raise ConfigError(f"scorer 'clip:{model}': {error}") from None


def _network(name: str, file: str | None, judge: AdherenceJudge | None) -> FeatureNetwork:
    if file is None:
        assert judge is not None
        return judge_features(judge)
    return open_features(name, Path(file))


def find_tower(folder: Path, train: Real) -> SmallTower:
    """The tower kept in `folder`; trained on `train` and put there where there is none that can be used."""
    try:
        return load_tower(folder)
    except CheckpointError:
        with Progress("training a tower of texts and pictures, steps of", _STEPS) as progress:
            texts = [ask.text for ask in train.asks]
            tower = train_tower(train.pictures, texts, steps=_STEPS, progress=progress.update)
        save_tower(tower, folder)
        return tower


def find_classifier(folder: Path, train: Real) -> Classifier:
    """The classifier kept in `folder`; trained on `train` and put there where there is none that can be used.

    Raises:
        ConfigError: the pictures have no classes to tell apart.
    """
    labels = labels_of(train.asks)
    try:
        return load_classifier(folder)
    except CheckpointError:
        with Progress("training a classifier of pictures, steps of", _CLASSIFIER_STEPS) as progress:
            classifier = train_classifier(
                train.pictures, labels, steps=_CLASSIFIER_STEPS, progress=progress.update
            )
        save_classifier(classifier, folder)
        return classifier
