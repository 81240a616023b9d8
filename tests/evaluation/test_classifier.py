"""The classifier of labelled pictures: it learns, says how well, and is faithful when saved."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evaluation.asks import Ask
from evaluation.classifier import (
    FEWEST,
    Classifier,
    ClassifierScorer,
    labels_of,
    load_classifier,
    save_classifier,
    train_classifier,
)
from evaluation.prompts import Prompt
from models.checkpoint import CheckpointError
from models.registry import ConfigError

SHAPES = ("bar", "frame", "post")


def shapes(count: int, seed: int, side: int = 64) -> tuple[Tensor, list[str]]:
    """Pictures with a bright bar across, a post upright, or both: colour and place tell nothing."""
    rng = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 80, (count, 3, 1, 1), generator=rng).expand(-1, -1, side, side).clone()
    labels = [SHAPES[k % 3] for k in range(count)]
    quarter = side // 4
    for picture, label in zip(pictures, labels, strict=True):
        level = int(torch.randint(150, 250, (), generator=rng))
        at = int(torch.randint(quarter, 2 * quarter, (), generator=rng))
        wide = slice(at, at + quarter)
        if label in ("bar", "frame"):
            picture[:, wide, :] = level
        if label in ("post", "frame"):
            picture[:, :, wide] = level
    return pictures.to(torch.uint8), labels


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return train_classifier(*shapes(90, 1), steps=20)


def right(classifier: Classifier, pictures: Tensor, labels: list[str]) -> float:
    found = classifier.classify(pictures)
    return sum(one == other for one, other in zip(found, labels, strict=True)) / len(labels)


def test_it_learns_classes_and_says_how_well(classifier: Classifier) -> None:
    pictures, labels = shapes(60, 2)
    assert right(classifier, pictures, labels) > 0.9
    assert right(classifier, pictures, labels[1:] + labels[:1]) < 0.1
    card = classifier.card
    assert card.classes == SHAPES
    assert (card.pictures, card.held_out_pictures, card.steps) == (81, 9, 20)
    assert card.held_out > 0.7
    assert classifier.classify(pictures[:0]) == []


def test_labels_without_meaning_are_not_learnt() -> None:
    """Held-out accuracy is no training accuracy: what cannot be known is told as such."""
    pictures = torch.randint(0, 255, (90, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    card = train_classifier(pictures, ["one", "other"] * 45, steps=10).card
    assert card.held_out < 0.9


def test_a_picture_stands_alone_and_any_size_is_seen(classifier: Classifier) -> None:
    pictures, _ = shapes(40, 3)
    whole, threads = classifier.classify(pictures), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert classifier.classify(pictures[33:34]) == whole[33:34]
    finally:
        torch.set_num_threads(threads)
    assert classifier.classify(pictures.flip(3)) == whole
    assert right(classifier, *shapes(30, 4, side=128)) > 0.8
    with pytest.raises(ValueError, match="give uint8"):
        classifier.classify(pictures.float())


def test_training_is_a_function_of_seed_and_data() -> None:
    pictures, labels = shapes(54, 1)
    state, told = torch.get_rng_state(), list[int]()
    first = train_classifier(pictures, labels, seed=1, steps=2, progress=told.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert told == [1, 2]
    torch.rand(5)
    assert train_classifier(pictures, labels, seed=1, steps=2).sha256 == first.sha256
    assert train_classifier(pictures, labels, seed=2, steps=2).sha256 != first.sha256
    assert train_classifier(pictures, labels[1:] + labels[:1], seed=1, steps=2).card.data != first.card.data


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (["a"] * 40, "there are 1 classes"),
        (["a"] * 39 + ["b"], f"class 'b' has 1 pictures, but must have {FEWEST}"),
        ([str(k) for k in range(40)], "class '0' has 1 pictures"),
        (["a"] * 20, "40 pictures, 20 labels"),
    ],
)
def test_pictures_without_classes_are_refused(labels: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train_classifier(torch.zeros(40, 3, 64, 64, dtype=torch.uint8), labels)


def test_a_saved_classifier_comes_back(classifier: Classifier, tmp_path: Path) -> None:
    save_classifier(classifier, tmp_path / "kept")
    loaded = load_classifier(tmp_path / "kept")
    pictures, _ = shapes(6, 5)
    assert loaded.classify(pictures) == classifier.classify(pictures)
    assert (loaded.card, loaded.sha256) == (classifier.card, classifier.sha256)
    with pytest.raises(CheckpointError, match="no classifier can be read"):
        load_classifier(tmp_path)
    card = tmp_path / "kept" / "classifier.json"
    record = json.loads(card.read_text())
    for wrong in ({**record, "sha256": "0"}, {**record, "version": 0}, {**record, "classes": ["a"]}, {}, []):
        card.write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="train the classifier again"):
            load_classifier(tmp_path / "kept")


def asks(*pairs: tuple[str, str]) -> list[Ask]:
    return [Ask(text, of_class) for text, of_class in pairs for _ in range(FEWEST)]


def test_classes_are_a_field_of_the_record_or_the_captions() -> None:
    named = asks(("a bar", "bar"), ("a post", "post"))
    assert set(labels_of(named)) == {"bar", "post"}
    assert set(labels_of([Ask(ask.text) for ask in named])) == {"a bar", "a post"}
    with pytest.raises(ConfigError, match=r"scorer=classifier: there are 200 classes.*variety.class_field"):
        labels_of([Ask(f"number {k}") for k in range(200)])


def test_pictures_are_scored_by_the_class_that_their_prompt_names(classifier: Classifier) -> None:
    pictures, labels = shapes(6, 6)
    assert classifier.classify(pictures) == labels
    known = asks(
        ("a bar", "bar"),
        ("an upright post", "post"),
        ("a frame", "frame"),
        ("a thing", "bar"),
        ("a thing", "post"),
    )
    scorer = ClassifierScorer(classifier, known)
    prompts = [
        Prompt("whatever", "bar", "0"),  # by its category
        Prompt("a frame", "all", "1"),  # by what the caption meant in training
        Prompt("an upright post", "", "2"),
        Prompt("a bar", "frame", "3"),  # the category counts first: this picture is no frame
        Prompt("a thing", "", "4"),  # was said of two classes
        Prompt("unheard of", "all", "5"),
    ]
    found = scorer.score(pictures, prompts)["class"].tolist()
    assert found[:4] == [1.0, 1.0, 1.0, 0.0]
    assert all(math.isnan(value) for value in found[4:])
    with pytest.raises(ValueError, match="one for each"):
        scorer.score(pictures[:2], prompts)
