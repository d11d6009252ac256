"""The Toybox evaluation: what it asks, and what counts as right."""

import types

import numpy as np
import pytest

from vllama2_jax.data.records import read_records
from vllama2_jax.data.toybox import write_toybox
from vllama2_jax.evals.toybox import Score, evaluate_toybox, score_table
from vllama2_jax.media.image import ImageSpec
from vllama2_jax.media.preset import REFERENCE


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toybox") / "new"
    write_toybox(folder, 4, seed=0, heldout=16)
    return folder, read_records(folder / "heldout.json")


class Oracle:
    """Knows every answer to a question about a file, and notes what else it is asked."""

    config = types.SimpleNamespace(num_frames=8)
    card = types.SimpleNamespace(
        image=ImageSpec(64, "stretch", (0.5,) * 3, (0.5,) * 3), preset=REFERENCE
    )

    def __init__(self, folder, records):
        self.answers = {
            (str(folder / r.media.source), r.turns[0][0].removeprefix("<video>\n")): r.turns[0][1]
            for r in records
        }
        self.blind, self.frames = [], []

    def ask_batch(self, pairs, max_new_tokens, progress):
        out = []
        for media, question in pairs:
            if media is None:
                self.blind.append(question)
            elif isinstance(media, np.ndarray):
                self.frames.append(media)
            out.append(self.answers.get((str(media), question), "left"))
        progress(len(out), len(pairs))
        return out


def test_accuracy_is_exact_match_per_kind_and_condition(heldout):
    folder, records = heldout
    oracle, seen = Oracle(folder, records), []
    scores = evaluate_toybox(oracle, records, folder, progress=lambda *x: seen.append(x))
    n = len(records)
    assert seen == [(n, 3 * n), (2 * n, 3 * n), (3 * n, 3 * n)]
    by_kind = {score.kind: score for score in scores}
    assert set(by_kind) == {"colour", "shape", "direction", "order", "count", "change"}
    for kind, score in by_kind.items():
        assert score.count == 4
        assert score.accuracy["video"] == 1.0
        assert score.accuracy["blind"] == (0.25 if kind == "direction" else 0.0)
    assert len(oracle.blind) == n and "<video>" not in "".join(oracle.blind)


def test_shuffled_frames_are_the_sampled_ones_in_another_order(heldout):
    folder, records = heldout
    oracle = Oracle(folder, records)
    evaluate_toybox(oracle, records, folder)
    moved = 0
    for record, frames in zip(records, oracle.frames, strict=True):
        assert frames.shape == (8, 64, 64, 3) and frames.dtype == np.uint8
        if record.kind == "direction":
            again = Oracle(folder, records)
            evaluate_toybox(again, [record], folder, seed=5)
            (other,) = again.frames
            assert sorted(f.tobytes() for f in frames) == sorted(f.tobytes() for f in other)
            moved += frames.tobytes() != other.tobytes()
    assert moved == 4


def test_sigma_is_that_of_a_guesser_and_the_table_stars_temporal_kinds():
    score = Score("order", 400, 0.5, {"video": 0.9, "blind": 0.5, "shuffled": 0.51})
    assert score.sigma == pytest.approx(0.025)
    table = score_table([score])
    assert [next(iter(column.cells)) for column in table.columns] == [
        "order*",
        "400",
        "90.0",
        "50.0",
        "51.0",
        "50.0",
        "2.5",
    ]
