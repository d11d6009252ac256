"""The Toybox evaluation: what it asks, and what counts as right."""

import types

import numpy as np
import pytest

from vllama2_jax.data.records import read_records
from vllama2_jax.data.toybox.families import FAMILIES_OF
from vllama2_jax.data.toybox.files import write_toybox
from vllama2_jax.data.toybox.questions import KINDS
from vllama2_jax.evals.toybox import Score, evaluate_toybox, score_table
from vllama2_jax.media.image import ImageSpec
from vllama2_jax.media.preset import REFERENCE


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toybox") / "new"
    write_toybox(folder, 12, seed=0, heldout=48)
    return folder, read_records(folder / "heldout.json")


def _question(record):
    return record.turns[0][0].split("\n")[1]


class Oracle:
    """Knows every answer to a question about a whole file, and notes how else it is asked."""

    config = types.SimpleNamespace(num_frames=8)
    card = types.SimpleNamespace(
        image=ImageSpec(64, "stretch", (0.5,) * 3, (0.5,) * 3), preset=REFERENCE
    )

    def __init__(self, folder, records):
        self.answers = {
            (str(folder / r.media.source), _question(r)): r.turns[0][1] for r in records
        }
        self.blind, self.frames, self.partly = [], [], []

    def ask_batch(self, pairs, modality, max_new_tokens, progress):
        out = []
        for media, question in pairs:
            if media is None:
                self.blind.append(question)
            elif isinstance(media, np.ndarray):
                self.frames.append(media)
            elif modality != "auto":
                self.partly.append((modality, question))
                media = None
            out.append(self.answers.get((str(media), question), "left"))
        progress(len(out), len(pairs))
        return out


def test_accuracy_is_exact_match_per_kind_and_condition(heldout):
    folder, records = heldout
    oracle, seen = Oracle(folder, records), []
    scores = evaluate_toybox(oracle, records, folder, progress=lambda *x: seen.append(x))
    n, videos, both = len(records), 4 * 7, 4 * 2
    steps = np.cumsum([n, n, videos, both, both])
    assert seen == [(done, steps[-1]) for done in steps]
    by_kind = {score.kind: score for score in scores}
    assert tuple(by_kind) == KINDS
    for kind, score in by_kind.items():
        assert score.count == 4
        assert score.accuracy["whole"] == 1.0
        assert score.accuracy["blind"] == (0.25 if kind == "direction" else 0.0)
        also = set(score.accuracy) - {"whole", "blind"}
        if kind in FAMILIES_OF["av"]:
            assert also == {"pictures", "sound"}
        else:
            assert also == (set() if kind in FAMILIES_OF["audio"] else {"shuffled"})
    assert len(oracle.blind) == n and "<" not in "".join(oracle.blind)
    asked = [_question(r) for r in records if r.kind in FAMILIES_OF["av"]]
    assert oracle.partly == [(m, question) for m in ("video", "audio") for question in asked]


def test_shuffled_frames_are_the_sampled_ones_in_another_order(heldout):
    folder, records = heldout
    oracle = Oracle(folder, records)
    evaluate_toybox(oracle, records, folder)
    moved, videos = 0, [record for record in records if record.media.kind == "video"]
    for record, frames in zip(videos, oracle.frames, strict=True):
        assert frames.shape == (8, 64, 64, 3) and frames.dtype == np.uint8
        if record.kind == "direction":
            again = Oracle(folder, records)
            evaluate_toybox(again, [record], folder, seed=5)
            (other,) = again.frames
            assert sorted(f.tobytes() for f in frames) == sorted(f.tobytes() for f in other)
            moved += frames.tobytes() != other.tobytes()
    assert moved == 4


def test_sigma_is_that_of_a_guesser_and_the_table_stars_temporal_kinds():
    scores = [
        Score("order", 400, 0.5, {"whole": 0.9, "blind": 0.5, "shuffled": 0.51}),
        Score("sync", 400, 0.5, {"whole": 0.9, "blind": 0.5, "pictures": 0.51, "sound": 0.52}),
    ]
    assert scores[0].sigma == pytest.approx(0.025)
    rows = zip(*(column.cells for column in score_table(scores).columns), strict=True)
    assert list(rows) == [
        ("order*", "400", "90.0", "50.0", "51.0", "", "", "50.0", "2.5"),
        ("sync", "400", "90.0", "50.0", "", "51.0", "52.0", "50.0", "2.5"),
    ]
