"""One global batch is one step, on 1, 2 and 4 ranks, in however many micro-batches, and across a kill -9."""

import json

import pytest

from tests.distributed.runs import BATCH, IMAGES, STEPS, Runs, furthest

pytestmark = pytest.mark.distributed

TREE = ("trainer.reduce=tree", "trainer.micro_batch=0", "plan.diffusion.checkpoint_every_images=16")
#: Ranks and micro-batches of each; the first one is the run that the others are compared with.
WAYS = {(1, 1): "one", (2, 1): "two", (4, 1): "four", (1, 2): "one-2", (1, 8): "one-8", (2, 2): "two-2"}
#: Largest difference of a loss, as a share of it, and of a weight (after 24 steps of at most 1e-3).
LOSS, WEIGHT = 2e-5, 2e-5


@pytest.mark.parametrize(("ranks", "accumulate"), list(WAYS)[1:])
def test_any_ranks_and_micro_batches_learn_the_same(ranks: int, accumulate: int, runs: Runs) -> None:
    one = runs.run(WAYS[1, 1], 1)
    other = runs.run(WAYS[ranks, accumulate], ranks, f"trainer.accumulate={accumulate}")
    losses, wanted = other.losses(), one.losses()
    assert losses.keys() == wanted.keys()
    assert len(losses) == STEPS + 3
    assert losses == pytest.approx(wanted, rel=LOSS)
    for stage in ("autoencoder", "diffusion"):
        assert 0 < furthest(one.weights(stage), other.weights(stage)) < WEIGHT


@pytest.mark.parametrize(("ranks", "accumulate"), [(2, 1), (4, 1), (4, 2), (1, 2)])
def test_added_as_a_tree_the_bits_are_the_same(ranks: int, accumulate: int, runs: Runs) -> None:
    one = runs.run("tree", 1, *TREE)
    other = runs.run(f"tree-{ranks}-{accumulate}", ranks, *TREE, f"trainer.accumulate={accumulate}")
    assert other.states() == one.states()
    assert other.losses() == one.losses()


def test_another_micro_batch_is_another_tree(runs: Runs) -> None:
    """The test above could not fail if the bits did not depend on what is added to what."""
    one = runs.run("tree", 1, *TREE)
    other = runs.run("tree-leaves-of-2", 1, *TREE, "trainer.micro_batch=2", "plan.autoencoder.batch_size=16")
    assert one.states()["diffusion"] != other.states()["diffusion"]


@pytest.mark.parametrize("words", [TREE, ("plan.diffusion.checkpoint_every_images=16",)])
def test_killed_runs_go_on_with_other_ranks(words: tuple[str, ...], runs: Runs) -> None:
    """2 ranks are killed, 4 go on and are killed, and one process comes to the end."""
    exact = words is TREE
    whole = runs.run("tree", 1, *TREE) if exact else runs.run(WAYS[1, 1], 1)
    name = f"killed-{'tree' if exact else 'fast'}"
    runs.kill_after(6, name, 2, *words)
    runs.kill_after(14, name, 4, *words)
    end = runs.run(name, 1, *words)
    if exact:
        assert end.states() == whole.states()
        assert end.losses() == whole.losses()
    else:
        assert end.losses() == pytest.approx(whole.losses(), rel=LOSS)
        assert furthest(end.weights("diffusion"), whole.weights("diffusion")) < WEIGHT
    read: dict[int, list[int]] = {}
    for rank in range(4):
        path = end.folder / "diffusion" / f"trace-{rank}.jsonl"
        for line in path.read_text().splitlines():
            row = json.loads(line)
            read.setdefault(row["images"], []).extend(row["indices"])
    assert all(set(read[first]) == set(range(first, first + BATCH)) for first in range(0, IMAGES, BATCH))


def test_ranks_that_encode_ahead_learn_what_one_learns_from_pictures(runs: Runs) -> None:
    one, other = runs.run(WAYS[1, 1], 1), runs.run("ahead", 2, "data.precompute=on")
    assert "pictures are encoded once, ahead of the steps" in other.said
    assert (other.folder / "moments" / "precomputed.json").exists()
    assert other.losses() == pytest.approx(one.losses(), rel=1e-3)
