"""The embedded model: small, intact, and as good as the README says."""

import re
from pathlib import Path

import pytest

import vllama2_jax as vl
from vllama2_jax.data.records import read_records
from vllama2_jax.data.toybox import write_toybox
from vllama2_jax.data.toybox_questions import TEMPORAL_KINDS
from vllama2_jax.evals.toybox import evaluate_toybox
from vllama2_jax.weights import TINY


@pytest.fixture(scope="module")
def model():
    return vl.load("tiny")


def test_it_takes_at_most_8_megabytes():
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= 8_000_000


def test_it_answers_held_out_videos(model, tmp_path):
    """A sample of what `python -m vllama2_jax.evals.toybox tiny` measures in full."""
    folder = tmp_path / "toybox"
    write_toybox(folder, clips=4, seed=11, heldout=240)
    records = read_records(folder / "heldout.json")
    scores = {score.kind: score for score in evaluate_toybox(model, records, folder)}
    for kind, least in {"colour": 0.95, "shape": 0.9, "direction": 0.9, "order": 0.9}.items():
        assert scores[kind].accuracy["video"] >= least, kind
    for kind in TEMPORAL_KINDS:
        for condition in ("blind", "shuffled"):
            excess = scores[kind].accuracy[condition] - scores[kind].chance
            assert abs(excess) <= 3 * scores[kind].sigma, (kind, condition)


def test_doctor_finds_the_golden_answer(capsys):
    from vllama2_jax.cli import main

    assert main(["doctor"]) == 0
    assert re.search(r"golden answer.*->", capsys.readouterr().out)


def test_demo_asks_real_files_and_keeps_their_frames(tmp_path, capsys):
    from vllama2_jax.demo import main

    assert main(["--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    videos, pictures = sorted(tmp_path.glob("*.mp4")), sorted(tmp_path.glob("*.png"))
    assert len(videos) == len(pictures) == 4
    right, asked = map(int, re.search(r"(\d+) of (\d+) right", printed).groups())
    assert asked >= 6 and right >= asked - 1


def test_it_takes_real_clips(model, real_media: Path):
    for name, modality in {"sample_demo_1.mp4": "video", "desert.jpg": "image"}.items():
        session = model.session(real_media / name)
        assert session.media.modality == modality
        assert session.ask("What colour is it?", max_new_tokens=4)
