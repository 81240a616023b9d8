"""The overhead benchmark: both loops do the same work, and it notices where they do not."""

from typing import Any

import pytest

from scripts.benches.overhead import AGAIN, BARE, OURS, Bare, overhead


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # Lightning's own, about loaders without workers
def test_both_loops_come_to_the_same_weights() -> None:
    findings = overhead(batch=2, steps=1, rounds=2)
    document = findings.document()
    assert document["same_weights"] is True
    assert set(document["milliseconds_a_step"]) == {BARE, OURS, AGAIN}
    assert document["host_reads_a_step"] == 0
    assert "kept" in findings.text()


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
def test_another_learning_rate_is_noticed(monkeypatch: Any) -> None:
    def halved(self: Bare, stage: Any) -> None:
        init(self, stage)
        self.peaks = [0.5 * peak for peak in self.peaks]

    init = Bare.__init__
    monkeypatch.setattr(Bare, "__init__", halved)
    with pytest.raises(ValueError, match="other weights"):
        overhead(batch=2, steps=1, rounds=2)


def test_rounds_are_pairs() -> None:
    with pytest.raises(ValueError, match="even"):
        overhead(rounds=3)
