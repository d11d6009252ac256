"""The embedded model: small, intact, and as good as the README says."""

import re
from pathlib import Path

import pytest

import vllama2_jax as vl
from vllama2_jax.data.records import read_records
from vllama2_jax.data.toybox.families import FAMILIES, FAMILIES_OF
from vllama2_jax.data.toybox.files import write_toybox
from vllama2_jax.data.toybox.questions import TEMPORAL_KINDS
from vllama2_jax.evals.toybox import evaluate_toybox
from vllama2_jax.weights import TINY

LEAST = {"colour": 0.95, "count": 0.7, "change": 0.5}
LEAST |= dict.fromkeys(("shape", "direction", "order", "bounce"), 0.9)
LEAST |= dict.fromkeys(FAMILIES_OF["audio"], 0.9) | dict.fromkeys(FAMILIES_OF["av"], 0.85)


@pytest.fixture(scope="module")
def model():
    return vl.load("tiny")


def test_it_takes_at_most_12_megabytes():
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= 12_000_000


@pytest.fixture(scope="module")
def scores(model, tmp_path_factory):
    """A sample of what `python -m vllama2_jax.evals.toybox tiny` measures in full."""
    folder = tmp_path_factory.mktemp("heldout") / "toybox"
    write_toybox(folder, clips=len(FAMILIES), seed=11, heldout=60 * len(FAMILIES))
    records = read_records(folder / "heldout.json")
    return {score.kind: score for score in evaluate_toybox(model, records, folder)}


@pytest.mark.parametrize("kind", LEAST)
def test_it_answers_held_out_questions(scores, kind):
    assert scores[kind].accuracy["whole"] >= LEAST[kind]


@pytest.mark.parametrize("kind", TEMPORAL_KINDS + FAMILIES_OF["av"])
def test_what_lacks_half_of_what_a_question_needs_does_not_give_it_away(scores, kind):
    conditions = ("shuffled",) if kind in TEMPORAL_KINDS else ("pictures", "sound")
    for condition in ("blind", *conditions):
        excess = scores[kind].accuracy[condition] - scores[kind].chance
        assert abs(excess) <= 3 * scores[kind].sigma, condition


def test_doctor_finds_the_golden_answer(capsys):
    from vllama2_jax.cli import main

    assert main(["doctor"]) == 0
    assert re.search(r"golden answer.*->", capsys.readouterr().out)


def test_demo_asks_real_files_and_keeps_pictures_of_what_was_looked_at_and_heard(tmp_path, capsys):
    from vllama2_jax.demo import main

    assert main(["--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    files = {suffix: len(list(tmp_path.glob(f"*/*{suffix}"))) for suffix in (".mp4", ".wav")}
    assert files == {".mp4": 6, ".wav": 2}
    assert len(list(tmp_path.glob("*/*.frames.png"))) == 6
    assert len(list(tmp_path.glob("*/*.sound.png"))) == 4
    right, asked = map(int, re.search(r"(\d+) of (\d+) right", printed).groups())
    assert asked >= 10 and right >= asked - 1


@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("sample_demo_1.mp4", "av"),
        ("output_v_3V9tzjyr51I.mp4", "video"),  # it has no track
        ("bird-twitter-car.wav", "audio"),
        ("desert.jpg", "image"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*(are|is) heard")
def test_it_takes_real_clips(model, real_media: Path, name, modality):
    session = model.session(real_media / name)
    assert session.media.modality == modality
    assert session.ask("What colour is it?", max_new_tokens=4)
