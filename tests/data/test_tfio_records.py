"""TFRecords become records: what can be known of it without TensorFlow."""

import argparse
import dataclasses
import io
import json
import subprocess
import sys
import wave
from pathlib import Path

import numpy as np
import pytest

from vllama2_jax.data import tfio_ingest, tfio_job
from vllama2_jax.data.files import local_media
from vllama2_jax.data.records import Media, RecordError
from vllama2_jax.data.sources import open_source
from vllama2_jax.data.tfio_job import Job, Keys, add_job_options, run_job
from vllama2_jax.data.tfio_records import id_of_example, sound_of, take, wav_bytes

MP4, JPEG, PNG = b"\0\0\0\x18ftypisom", b"\xff\xd8\xff rest", b"\x89PNG\r\n\x1a\n rest"
WAV = wav_bytes(np.zeros(4))
TWO_TURNS = [
    {"from": "human", "value": "<image>\nWas ist größer?"},
    {"from": "gpt", "value": "The ball."},
]


def numbers(*values):
    return np.asarray(values, np.int64)


def floats(*values):
    return np.asarray(values, np.float32)


def said(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def taken(features, wav=None, keys=None, **options):
    return take(features, keys or Keys(), "a", wav, **options)


def test_a_captioned_video_is_one_record_that_names_its_content():
    records, files = taken({"video": [MP4], "caption": ["Ein Bär.".encode()]}, dataset="toys")
    (path, content), (record,) = files[0], records
    assert content == MP4 and path.endswith(".mp4") and len(files) == 1
    assert record == {
        "id": "a",
        "video": path,
        "dataset": "toys",
        "conversations": said("<video>\n", "Ein Bär."),
    }


def test_several_captions_make_as_many_records_about_the_same_media():
    features = {"image": [JPEG], "caption": [b"A ball.", b"Red."], "question": [b"What?", b"How?"]}
    records, files = taken(features)
    assert [path for path, _ in files] == [records[0]["image"]] == [records[1]["image"]]
    assert [record["id"] for record in records] == ["a-0", "a-1"]
    assert [record["conversations"] for record in records] == [
        said("<image>\nWhat?", "A ball."),
        said("<image>\nHow?", "Red."),
    ]


def test_a_placeholder_that_a_question_holds_stays_where_it_is():
    features = {"video": [MP4], "caption": [b"A ball."], "question": [b"What is in <video>?"]}
    assert taken(features).records[0]["conversations"] == said("What is in <video>?", "A ball.")
    prompted = taken({"video": [MP4], "caption": [b"A ball."]}, prompt="Describe it.")
    assert prompted.records[0]["conversations"][0]["value"] == "<video>\nDescribe it."


def test_conversations_go_before_captions():
    text = json.dumps(TWO_TURNS).encode()
    features = {"image": [PNG], "caption": [b"A ball."], "conversations": [text]}
    (record,), ((path, _),) = taken(features)
    assert record["conversations"] == TWO_TURNS and path.endswith(".png")


def test_several_values_of_a_video_are_its_frames_in_order():
    (record,), files = taken({"video": [PNG, JPEG, PNG], "caption": [b"A ball."]})
    assert record["video"] == [path for path, _ in files]
    assert [content for _, content in files] == [PNG, JPEG, PNG] and files[0] == files[2]


def test_a_question_without_media_is_a_record_of_text():
    (record,), files = taken({"question": [b"Hello?"], "caption": [b"Hello."]})
    assert record == {"id": "a", "conversations": said("Hello?", "Hello.")} and not files


def test_a_sound_stands_alone_or_beside_its_video_which_keeps_the_placeholder():
    (alone,), files = taken({"caption": [b"Rain."]}, WAV)
    assert alone["audio"].endswith(".wav") and files == [(alone["audio"], WAV)]
    assert alone["conversations"][0]["value"] == "<audio>\n"
    (both,), files = taken({"video": [MP4], "caption": [b"Rain."]}, WAV)
    assert [path for path, _ in files] == [both["video"], both["audio"]]
    assert both["conversations"][0]["value"] == "<video>\n"


@pytest.mark.parametrize(
    ("features", "wav", "message"),
    [
        ({"clip": [MP4]}, None, r"neither `caption` nor `conversations`; .* holds clip \(bytes\)$"),
        ({}, None, "the Example holds nothing"),
        ({"clip": [MP4], "caption": [b"A."]}, None, "a caption of nothing.*; .* caption .*, clip"),
        (
            {"video": numbers(1), "caption": [b"A."]},
            None,
            r"`video` must be bytes; .*whole numbers",
        ),
        ({"video": [MP4], "image": [PNG], "caption": [b"A."]}, None, "holds image and video"),
        ({"image": [PNG, PNG], "caption": [b"A."]}, None, "`image` must be a path"),
        ({"image": [PNG], "caption": [b"A."]}, WAV, "an image and a sound"),
        ({"video": [MP4], "caption": [b"\xff"]}, None, "`caption` is not text"),
        ({"video": [MP4], "caption": [b"A."], "question": [b"B", b"C"]}, None, "2 values, .* 1"),
        ({"video": [MP4], "conversations": [b"{"]}, None, "`conversations` is not JSON"),
        ({"video": [MP4], "conversations": [b"{}"]}, None, "a list `conversations`"),
        (
            {"conversations": [json.dumps(TWO_TURNS).encode()]},
            None,
            "holds <image> but there is no",
        ),
        ({"conversations": [json.dumps(said("What?", "A.")).encode()]}, WAV, "must hold <audio>"),
        ({"caption": [b"a <audio>"]}, WAV, "must hold <audio>, and no answer"),
        ({"conversations": [b"[3]"]}, WAV, "every sentence needs"),
    ],
)
def test_an_example_that_makes_no_record_is_one_line_with_its_features(features, wav, message):
    with pytest.raises(ValueError, match=message) as error:
        taken(features, wav)
    assert "the Example holds" in str(error.value) and "\n" not in str(error.value)


def test_names_of_features_can_be_given_and_taken_away():
    features = {"vid": [MP4], "txt": [b"A ball."], "image": [PNG]}
    (record,), _ = taken(features, keys=Keys(video="vid", caption="txt", image=""))
    assert "video" in record and "image" not in record


def test_an_id_is_text_or_a_whole_number_or_the_place():
    assert id_of_example({"id": [b"kitten"]}, Keys(), "f-3") == "kitten"
    assert id_of_example({"id": numbers(7)}, Keys(), "f-3") == "7"
    assert id_of_example({"name": [b"kitten"]}, Keys(), "f-3") == "f-3"
    for value in (floats(1.5), numbers(1, 2)):
        with pytest.raises(ValueError, match="`id` must be one text or one whole number"):
            id_of_example({"id": value}, Keys(), "f-3")


def test_a_sound_is_a_file_or_samples_whose_rate_somebody_tells():
    assert sound_of({"caption": [b"A."]}, Keys()) is None
    assert sound_of({"audio": [b"RIFF"], "rate": numbers(8000)}, Keys()) == (b"RIFF", None)
    told = sound_of({"audio": floats(0, 1), "rate": floats(22050)}, Keys(), rate=8000)
    assert told.rate == 22050 and told.content.tolist() == [0, 1]
    assert sound_of({"audio": floats(0, 1)}, Keys(), rate=8000).rate == 8000


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({"audio": floats(0)}, "nothing says their rate; .*--rate-key.* holds audio"),
        ({"audio": floats(0), "rate": floats(0.5)}, "`rate` must be one whole number"),
        ({"audio": floats(0), "rate": [b"16k"]}, "`rate` must be one whole number"),
        ({"audio": numbers(0)}, "samples are floats"),
        ({"audio": [b"RIFF", b"RIFF"]}, "one sound file, not 2"),
    ],
)
def test_a_sound_that_cannot_be_used_is_one_line(features, message):
    with pytest.raises(ValueError, match=message):
        sound_of(features, Keys())


def test_a_wav_holds_the_samples_rounded_and_clipped():
    samples = floats(0, 0.5, -0.25, 1.5, -1.5, 1 / 65536)
    with wave.open(io.BytesIO(wav_bytes(samples))) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16000)
        held = np.frombuffer(file.readframes(100), "<i2")
    assert held.tolist() == [0, 16384, -8192, 32767, -32768, 0]
    for bad in (floats(), floats(0, np.nan)):
        with pytest.raises(ValueError, match="no samples, or some that are not finite"):
            wav_bytes(bad)


def ingested(folder, examples, **options):
    job = Job("in.tfrecord", str(folder), **options)
    placed = [("d/in.tfrecord", number, raw) for number, raw in enumerate(examples)]
    silence = np.zeros(4, np.float32)
    return tfio_ingest.ingest(job, placed, lambda raw: raw, lambda sound: silence)


def captioned(video, caption=b"A ball.", **more):
    return {"video": [video], "caption": [caption], **more}


def test_a_pack_holds_equal_media_once_and_is_read_as_any_other(tmp_path):
    examples = [captioned(MP4), captioned(MP4, b"Red."), captioned(MP4 + b"2", id=[b"c"])]
    assert ingested(tmp_path / "pack", examples) == {
        "records": 3,
        "media": 2,
        "bytes": 2 * len(MP4) + 1,
        "left_out": 0,
    }
    source = open_source(tmp_path / "pack")
    assert [record.id for record in source] == ["in.tfrecord-0", "in.tfrecord-1", "c"]
    assert source[0].media == source[1].media == Media("video", source[0].media.source)
    assert [source.media_bytes(i) for i in range(3)] == [(MP4,), (MP4,), (MP4 + b"2",)]


def test_a_video_with_a_sound_file_is_packed_as_both(tmp_path):
    examples = [captioned(MP4), captioned(MP4, audio=[b"RIFF"])]
    ingested(tmp_path / "pack", examples)
    source = open_source(tmp_path / "pack")
    assert source[0].media.kind == "video"
    media = source[1].media
    assert media.kind == "av" and media.sound.endswith(".wav")
    assert source.media_bytes(1) == (MP4, WAV)
    with local_media(source, 1, media, "nowhere") as places:
        assert Path(media.pictures(places)).read_bytes() == MP4
        assert Path(media.track(places)).read_bytes() == WAV


def test_bad_examples_are_named_and_left_out_up_to_a_number(tmp_path, capsys):
    examples = [captioned(MP4), {"id": [b"odd"], "video": [MP4]}, {"clip": [MP4]}]
    with pytest.raises(RecordError) as error:
        ingested(tmp_path / "one", examples, max_bad=1)
    assert error.value.number == 2 and error.value.cause.startswith("has no words")
    assert "--max-bad" in str(error.value)
    assert "left out: d/in.tfrecord, record 1 (id odd): has no words" in capsys.readouterr().err
    assert ingested(tmp_path / "two", examples, max_bad=2)["left_out"] == 2
    assert len(open_source(tmp_path / "two")) == 1
    with pytest.raises(ValueError, match=r"not a finished pack .*pack\.json"):
        open_source(tmp_path / "one")
    with pytest.raises(ValueError, match="no Examples that can be used, of 1"):
        ingested(tmp_path / "none", examples[1:2], max_bad=9)


def test_a_typed_name_that_no_example_holds_is_an_error_and_a_usual_one_is_not(tmp_path):
    keys = {"audio": "sound", "caption": "caption"}
    with pytest.raises(
        ValueError, match=r"^none of 2 Examples holds `sound` \(--audio-key\); .*vid"
    ):
        ingested(tmp_path / "typed", [captioned(MP4)] * 2, keys=keys)
    some = [captioned(MP4), captioned(MP4, sound=[b"RIFF"])]
    assert ingested(tmp_path / "some", some, keys=keys)["records"] == 2


def test_a_typed_name_is_missed_early(tmp_path, monkeypatch):
    monkeypatch.setattr(tfio_ingest, "_PATIENCE", 3)
    with pytest.raises(ValueError, match=r"^none of 3 Examples holds `sound`"):
        ingested(tmp_path / "typed", [captioned(MP4)] * 5, keys={"audio": "sound"})


def options_of(*words):
    parser = argparse.ArgumentParser()
    add_job_options(parser)
    return parser.parse_args(words, argparse.Namespace(debug=False))


def test_the_command_sends_its_job_to_the_other_python_and_returns_its_code(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nprintf %s "$5" > "{tmp_path}/job"; echo "$1 $2" >&2; exit 7\n')
    python.chmod(0o755)
    words = ["in", "out", "--python", str(python), "--video-key", "vid", "--image-key="]
    assert run_job(options_of(*words, "--rate", "8000", "--max-bad", "2", "--first-channel")) == 7
    job = Job(**json.loads((tmp_path / "job").read_text()))
    keys = {"video": "vid", "image": ""}
    assert job == Job("in", "out", keys, rate=8000, first_channel=True, max_bad=2)
    python.write_text("#!/bin/sh\nkill -9 $$\n")
    with pytest.raises(ValueError, match="killed by signal 9"):
        run_job(options_of(*words))


def test_every_feature_has_an_option_with_its_usual_name(capsys):
    with pytest.raises(SystemExit):
        options_of("--help")
    shown = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(Keys):
        assert f"--{field.name}-key NAME" in shown and f"({field.default})" in shown


@pytest.mark.parametrize("given", [None, "/nowhere/python"])
def test_a_missing_environment_is_one_line_that_says_make_tfio(tmp_path, monkeypatch, given):
    monkeypatch.setattr(tfio_job, "ENVIRONMENT", tmp_path)
    python = ["--python", given] if given else []
    with pytest.raises(ValueError, match=r"no such Python; `make tfio` makes .* --python"):
        run_job(options_of("in", "out", *python))


def test_a_python_without_tensorflow_says_so_in_one_line(tmp_path, capfd):
    words = ["in", str(tmp_path / "out"), "--python", sys.executable]
    assert run_job(options_of(*words)) == 2
    err = capfd.readouterr().err
    assert err.startswith("vllama2 data: ") and err.count("\n") == 1
    assert "`make tfio` makes an environment" in err


def test_the_other_environment_needs_no_more_than_its_constraints_name():
    """Whatever else of ours these modules came to import is not installed there."""
    code = (
        "import sys\n"
        "for name in ('jax flax optax orbax grain fiddle transformers tokenizers sentencepiece '\n"
        "             'jinja2 safetensors huggingface_hub av scipy torch regex').split():\n"
        "    sys.modules[name] = None\n"
        "import vllama2_jax.data.tfio_ingest"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
