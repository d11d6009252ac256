"""The `vllama2` command, as a person at a shell meets it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vllama2_jax.cli import main

pytest.importorskip("torch")
from oracle import write_miniature


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("released")
    write_miniature(folder, "qwen2", "siglip", "stc_connector_v35")
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("media") / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def ask(checkpoint, image, *options):
    return [
        "ask",
        str(image),
        "What?",
        "--model",
        str(checkpoint),
        "--max-new-tokens",
        "5",
        *options,
    ]


def test_ask_prints_the_answer_alone(checkpoint, image, capsys):
    import vllama2_jax as vl

    assert main(ask(checkpoint, image)) == 0
    wanted = vl.load(checkpoint).ask(str(image), "What?", max_new_tokens=5)
    assert capsys.readouterr().out.strip() == wanted


def test_stream_prints_the_same_answer(checkpoint, image, capsys):
    main(ask(checkpoint, image))
    plain = capsys.readouterr().out
    main(ask(checkpoint, image, "--stream"))
    assert capsys.readouterr().out.strip() == plain.strip()


def test_json_is_one_object_with_what_was_looked_at(checkpoint, image, capsys, tmp_path):
    picture = tmp_path / "frames.png"
    assert main(ask(checkpoint, image, "--json", "--frames", str(picture))) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["question"] == "What?"
    assert record["modality"] == "image"
    assert record["frame_seconds"] == [None]
    assert Image.open(picture).width > 100


def test_a_converted_model_answers_the_same(checkpoint, image, capsys, tmp_path):
    saved = tmp_path / "saved"
    assert main(["convert", str(checkpoint), str(saved), "--dtype", "float32"]) == 0
    capsys.readouterr()
    main(ask(checkpoint, image))
    released = capsys.readouterr().out
    main(ask(saved, image))
    assert capsys.readouterr().out == released
    assert sorted(p.name for p in saved.iterdir()) == ["model_card.json", "params", "tokenizer"]


def test_a_changed_tokenizer_is_refused(checkpoint, image, capsys, tmp_path):
    saved = tmp_path / "saved"
    main(["convert", str(checkpoint), str(saved)])
    path = saved / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    assert main(ask(saved, image)) == 2
    assert "not the tokenizer files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "nowhere.mp4", "What?"], "nowhere.mp4"),
        (["ask", "x.png", "What?", "--model", "nonesuch"], "nonesuch"),
        (["ask", "x.png", "What?", "--model", "./nonesuch"], "nonesuch"),
        (["ask", "x.png", "What?", "--dtype", "float99"], "float99"),
        (["ask", "x.png", "What?", "--dtype", "int8"], "int8"),
        (["convert", "nonesuch", "out"], "nonesuch"),
        (["train", "--config", "nonesuch", "--out", "out"], "nonesuch"),
        (["data", "toybox", "out", "--clips", "1"], "clips"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments, message, checkpoint, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("x.png")
    if arguments[0] == "ask" and "--model" not in arguments:
        arguments = [*arguments, "--model", str(checkpoint)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


# Five to train on, and one held out of each of five families, or two.
@pytest.mark.parametrize(
    ("media", "suffixes", "count"), [("audio", {".wav"}, 5 + 5), ("av", {".mp4"}, 5 + 2)]
)
def test_a_toybox_of_some_media_holds_no_others(media, suffixes, count, tmp_path, capsys):
    folder = tmp_path / "toybox"
    assert main(["data", "toybox", str(folder), "--clips", "5", "--media", media]) == 0
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"]
    assert len(files) == count
    assert {path.suffix for path in files} == suffixes
    records = json.loads((folder / "train.json").read_text())
    assert {("video" in record, "audio" in record) for record in records} == {(media == "av", True)}


def test_debug_shows_the_traceback(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        main(["ask", "nowhere.mp4", "What?", "--model", str(checkpoint), "--debug"])


def test_chat_answers_each_line(checkpoint, image, capsys, monkeypatch):
    lines = iter(["What?", "Is <video> allowed?", "And then?", ""])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    options = ["--model", str(checkpoint), "--max-new-tokens", "5"]
    assert main(["chat", str(image), *options]) == 0
    printed = capsys.readouterr()
    answers = printed.out.splitlines()
    assert len(answers) >= 2 and all(answers)
    assert "placeholder" in printed.err  # the question that was refused; the talk went on


def test_help_needs_no_jax():
    code = (
        "import sys; from vllama2_jax.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert 'jax' not in sys.modules"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for command in ("ask", "chat", "convert", "data", "train", "doctor"):
        assert command in run.stdout
