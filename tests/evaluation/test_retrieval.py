"""Retrieval by hand-made vectors, and the tower of our own: deterministic, honest, faithful when saved."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from data.landscapes import caption, draw_scene, render
from evaluation.asks import Ask, Real
from evaluation.measure import Made, measure_names
from evaluation.prompts import Prompt
from evaluation.retrieval import Found, TextImageTower, TowerScorer, clip_score, ranks_among, retrieve
from evaluation.tower import DIM, SmallTower, load_tower, save_tower, train_tower, word_ids
from models.checkpoint import CheckpointError


def rendered(seed: int, count: int) -> tuple[Tensor, list[str]]:
    scenes = [draw_scene(seed, index) for index in range(count)]
    pixels = np.stack([render(scene) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), [caption(scene) for scene in scenes]


@pytest.fixture(scope="module")
def tower() -> SmallTower:
    return train_tower(*rendered(5, 800), steps=40)


class Lookup(TextImageTower):
    """Embeds a picture by its first level, and a text by the number it is."""

    def embed_pictures(self, pictures: Tensor) -> Tensor:
        return torch.eye(8)[pictures[:, 0, 0, 0].long()]

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return torch.stack([torch.eye(8)[abs(int(text))] * (-1 if text[0] == "-" else 1) for text in texts])


def levels(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).contiguous()


def test_ranks_are_those_of_a_table_by_hand() -> None:
    angles = torch.tensor([0.0, 0.5, 1.1, 1.8])
    vectors = torch.stack([angles.cos(), angles.sin()], 1)
    perfect = retrieve(vectors, vectors, ["a", "b", "c", "d"])
    assert perfect.text_to_image == perfect.image_to_text == Found(1.0, 1.0, 1.0)
    assert (perfect.pictures, perfect.texts) == (4, 4)
    turned = retrieve(vectors, vectors.roll(1, 0), ["a", "b", "c", "d"])
    assert turned.image_to_text.recall_1 == 0.0
    # Texts are at 1.8, 0, 0.5, 1.1: its own is the last for the first picture, the second for the rest.
    assert turned.image_to_text == Found(0.0, 1.0, 2.0)


def test_ranks_among_a_pool_by_hand() -> None:
    pool = torch.eye(4)
    pictures = torch.tensor([[0.9, 0.5, 0.1, 0.0], [0.9, 0.5, 0.1, 0.0], [0.0, 0.0, 0.7, 0.7]])
    assert ranks_among(pictures, pool, [0, 1, 2], 4).tolist() == [1, 2, 2]  # a tie counts against
    # Of two texts, its own and the next: 0 and 1, 1 and 2, 3 and 0.
    assert ranks_among(pictures, pool, [0, 1, 3], 2).tolist() == [1, 1, 1]
    assert ranks_among(pictures, pool, [0, 1, 2], 900).tolist() == [1, 2, 2]
    assert ranks_among(torch.ones(2, 4), pool, [0, 3], 3).tolist() == [3, 3]  # one picture for all names
    for own in ([0, 1], [0, 1, 4], [0, 1, -1]):
        with pytest.raises(ValueError, match="a pool of 4"):
            ranks_among(pictures, pool, own, 4)


def test_a_name_is_looked_for_among_a_hundred() -> None:
    """Generated and real pictures beside each other; training captions fill up the names."""
    numbers = [str(k) for k in range(8)]

    class Wide(Lookup):
        def embed_texts(self, texts: Sequence[str]) -> Tensor:
            return torch.stack(
                [torch.eye(8)[int(text)] if text in numbers else torch.ones(8) / 8**0.5 for text in texts]
            )

    def asked(texts: list[str]) -> tuple[Ask, ...]:
        return tuple(Ask(text) for text in texts)

    tower, real = Wide("wide", ""), levels(*range(8))
    made = Made(asked(numbers), levels(0, 1, 2, 3, 0, 0, 0, 0), (), real[:0], 4)
    train = Real(real, asked([f"other {k}" for k in range(200)]), ())
    found = measure_names(tower, made, train, real)
    assert found.by == {"names": 100}
    assert found.metrics["adherence_named_first"] == found.features["score_named_first"].mean() == 0.5
    assert found.metrics["adherence_named_first_real"] == found.metrics["adherence_named_in_five_real"] == 1.0
    assert found.metrics["adherence_named_in_five"] == 0.5
    assert "adherence_named_first_real" not in measure_names(tower, made, train, None).metrics
    assert (
        measure_names(tower, made, Real(real, asked(numbers), ()), real).metrics == {}
    )  # eight names say nothing


def test_equal_texts_are_one_and_ties_count_against() -> None:
    one, other = torch.eye(2)
    found = retrieve(torch.stack([one, other, other]), torch.stack([one, one, other]), ["a", "a", "b"])
    assert (found.pictures, found.texts) == (3, 2)
    assert found.text_to_image.recall_1 == 0.5  # "a" has a picture of its own first, "b" shares its place
    assert found.image_to_text.recall_1 == pytest.approx(2 / 3)
    collapsed = retrieve(torch.ones(6, 2), torch.randn(6, 2), list("abcdef"))
    assert collapsed.text_to_image == Found(0.0, 0.0, 6.0)
    for wrong in ((torch.ones(2, 2), torch.ones(2, 2), ["a"]), (torch.ones(0, 2), torch.ones(0, 2), [])):
        with pytest.raises(ValueError, match="one of each"):
            retrieve(*wrong)


def test_the_clip_score_is_a_cosine_without_its_negative_part() -> None:
    scores = clip_score(Lookup("lookup", ""), levels(1, 1, 2), ["1", "2", "-2"])
    assert scores.tolist() == [100.0, 0.0, 0.0]
    prompts = [Prompt(text, "all", text) for text in ("1", "2", "3")]
    found = TowerScorer(Lookup("lookup", "")).score(levels(1, 3, 3), prompts)
    assert found["clip_score"].tolist() == [100.0, 0.0, 100.0]
    assert found["retrieved"].tolist() == [1.0, 0.0, 1.0]
    with pytest.raises(ValueError, match="one for each"):
        TowerScorer(Lookup("lookup", "")).score(levels(1), prompts)


def test_swapped_captions_are_caught_by_retrieval(tower: SmallTower) -> None:
    """On pictures that the tower has not seen."""
    pictures, captions = rendered(6, 200)
    prompts = [Prompt(text, "all", str(k)) for k, text in enumerate(captions)]
    scorer = TowerScorer(tower)
    right, swapped = scorer.score(pictures, prompts), scorer.score(pictures, prompts[1:] + prompts[:1])
    assert right["clip_score"].mean() > swapped["clip_score"].mean() + 10
    found = [
        retrieve(tower.embed_pictures(pictures), tower.embed_texts(texts), texts)
        for texts in (captions, captions[1:] + captions[:1])
    ]
    assert found[0].text_to_image.recall_5 > 0.3 > 0.1 > found[1].text_to_image.recall_5
    assert found[0].image_to_text.median_rank < 20 < 50 < found[1].image_to_text.median_rank
    held_out = tower.card.held_out
    assert held_out["pictures"] == 80
    as_many = retrieve(tower.embed_pictures(pictures[:80]), tower.embed_texts(captions[:80]), captions[:80])
    assert held_out["text_to_image"]["recall_5"] == pytest.approx(as_many.text_to_image.recall_5, abs=0.2)


def test_rows_stand_alone(tower: SmallTower) -> None:
    pictures, captions = rendered(6, 40)
    whole, texts = tower.embed_pictures(pictures), tower.embed_texts(captions)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(tower.embed_pictures(pictures[33:34]), whole[33:34])
        assert torch.equal(tower.embed_texts(captions[33:34]), texts[33:34])
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(40))
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(40))
    assert tower.embed_pictures(pictures[:0]).shape == tower.embed_texts([]).shape == (0, DIM)
    assert tower.embed_texts(["", "?" * 5]).isfinite().all()


def test_training_is_a_function_of_seed_and_data() -> None:
    pictures, captions = rendered(5, 40)
    state = torch.get_rng_state()
    told: list[int] = []
    first = train_tower(pictures, captions, seed=1, steps=3, progress=told.append)
    assert torch.equal(torch.get_rng_state(), state)
    assert told == [1, 2, 3]
    torch.rand(5)
    assert train_tower(pictures, captions, seed=1, steps=3).sha256 == first.sha256
    assert train_tower(pictures, captions, seed=2, steps=3).sha256 != first.sha256
    assert train_tower(pictures, captions[1:] + captions[:1], seed=1, steps=3).card.data != first.card.data
    assert (first.card.pictures, first.card.steps, first.card.seed) == (36, 3, 1)
    for wrong in ((pictures, captions[1:]), (pictures[:8], captions[:8])):
        with pytest.raises(ValueError, match="at least 32 pairs"):
            train_tower(*wrong)


def test_equal_captions_are_no_error_to_each_other() -> None:
    """Two captions for all: each text learns all of its pictures, and held-out ones are told apart."""
    pixels = torch.randint(0, 60, (60, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    pixels[::2, 0] += 150
    captions = ["a red picture", "a dark picture"] * 30
    found = train_tower(pixels.byte(), captions, steps=20).card.held_out
    assert found["texts"] == 2
    assert found["image_to_text"]["recall_1"] == 1.0


def test_a_saved_tower_comes_back(tower: SmallTower, tmp_path: Path) -> None:
    save_tower(tower, tmp_path / "tower")
    loaded = load_tower(tmp_path / "tower")
    pictures, captions = rendered(6, 3)
    assert torch.equal(loaded.embed_pictures(pictures), tower.embed_pictures(pictures))
    assert torch.equal(loaded.embed_texts(captions), tower.embed_texts(captions))
    assert (loaded.card, loaded.sha256) == (tower.card, tower.sha256)
    with pytest.raises(CheckpointError, match="no tower can be read"):
        load_tower(tmp_path)
    card = tmp_path / "tower" / "tower.json"
    record = json.loads(card.read_text())
    for wrong in ({**record, "sha256": "0"}, {**record, "version": 0}, {"seed": 1}, []):
        card.write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="train the tower again"):
            load_tower(tmp_path / "tower")


def test_words_and_pairs_are_told_apart() -> None:
    ids = word_ids(["Hills, at dawn", "hills at dawn", "dawn at hills", ""])
    assert torch.equal(ids[0], ids[1])
    assert set(ids[0, :3].tolist()) == set(ids[2, :3].tolist())
    assert not torch.equal(ids[0, 3:].sort().values, ids[2, 3:].sort().values)
    assert ids[3].eq(0).all()
    assert word_ids(["word " * 500]).shape == (1, 96)
