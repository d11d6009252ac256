"""TFRecords become a pack in tensorflow-io's own environment, and come out as they went in."""

import argparse
import base64
import io
import json
import re
import subprocess
import wave

import av
import numpy as np
import pytest

from vllama2_jax.data.check import check
from vllama2_jax.data.sources import open_source
from vllama2_jax.data.tfio_job import ENVIRONMENT, ROOT, add_job_options, run_job
from vllama2_jax.data.toybox.files import golden_clip, write_video

pytestmark = pytest.mark.slow

RATE = 44_100
SECONDS = 1.5
# Left and right channel: (hertz, amplitude, phase) of their tones. Their number and phases leave no
# shift in time that could be taken for another.
LEFT = [(200, 0.2, 0.1), (1000, 0.15, 1.0), (5300, 0.1, 2.0)]
RIGHT = [(440, 0.25, 0.5), (3000, 0.2, 1.7)]

# Run by the environment's Python: [[file, compression, [{feature: values}]]] in JSON, bytes base64.
WRITER = """
import base64, json, sys
import tensorflow as tf

def feature(values):
    if isinstance(values[0], str):
        values = [base64.b64decode(value) for value in values]
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
    if isinstance(values[0], float):
        return tf.train.Feature(float_list=tf.train.FloatList(value=values))
    return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

for file, compression, examples in json.load(sys.stdin):
    with tf.io.TFRecordWriter(file, compression) as writer:
        for example in examples:
            features = {name: feature(values) for name, values in example.items()}
            example = tf.train.Example(features=tf.train.Features(feature=features))
            writer.write(example.SerializeToString())
"""


@pytest.fixture(scope="module")
def python():
    path = ENVIRONMENT / "bin" / "python"
    if not path.exists():
        pytest.skip("no .venv-tfio; `make tfio` makes it")
    return str(path)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    """As the command is; JAX, which other tests import, has set another level."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
        yield


def write_tfrecords(python, *files):
    """Write (path, compression, [{feature: value or values}])."""

    def sent(value):
        values = value if isinstance(value, list) else [value]
        values = [v.encode() if isinstance(v, str) else v for v in values]
        return [base64.b64encode(v).decode() if isinstance(v, bytes) else v for v in values]

    text = json.dumps(
        [
            [str(file), compression, [{k: sent(v) for k, v in e.items()} for e in examples]]
            for file, compression, examples in files
        ]
    )
    subprocess.run([python, "-c", WRITER], input=text, text=True, check=True, capture_output=True)


def ingest(python, *words):
    parser = argparse.ArgumentParser()
    add_job_options(parser)
    words = [*map(str, words), "--python", python]
    return run_job(parser.parse_args(words, argparse.Namespace(debug=False)))


def tone(parts, times):
    return sum(a * np.sin(2 * np.pi * hertz * times + phase) for hertz, a, phase in parts)


def stereo(rate=RATE):
    """Floats [samples, 2]."""
    times = np.arange(int(SECONDS * rate)) / rate
    return np.stack([tone(LEFT, times), tone(RIGHT, times)], 1)


def sound_file(container, codec, form=None):
    """The stereo tones as a sound file of FFmpeg's making."""
    content = io.BytesIO()
    with av.open(content, "w", format=container) as file:
        stream = file.add_stream(codec, rate=RATE, layout="stereo")
        stream.bit_rate = 320_000
        if form:
            stream.format = form
        samples = np.ascontiguousarray(stereo().T, np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
        frame.rate, frame.pts = RATE, 0
        resampler = av.AudioResampler(stream.format.name, "stereo", RATE, stream.frame_size or None)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(part))
        file.mux(stream.encode())
    return content.getvalue()


def plain_wav_32():
    """32-bit whole numbers under the plain header, which FFmpeg does not write."""
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((2, 4, RATE, 0, "NONE", ""))
        file.writeframes(np.rint(stereo() * 2**31).astype("<i4").tobytes())
    return content.getvalue()


# Each kind of file that tensorflow-io decodes, with the largest error that its coding explains.
KINDS = {
    "wav-8": (lambda: sound_file("wav", "pcm_u8"), 1.5 / 128),
    "wav-16": (lambda: sound_file("wav", "pcm_s16le"), 2 / 32768),
    "wav-24": (lambda: sound_file("wav", "pcm_s24le"), 2 / 32768),
    "wav-32": (lambda: sound_file("wav", "pcm_s32le"), 2 / 32768),
    "wav-32-plain": (plain_wav_32, 2 / 32768),
    "wav-float": (lambda: sound_file("wav", "pcm_f32le"), 2 / 32768),
    "flac": (lambda: sound_file("flac", "flac", "s16"), 2 / 32768),
    "mp3": (lambda: sound_file("mp3", "libmp3lame"), 0.01),
}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("toybox") / "ball.mp4"
    write_video(path, golden_clip()[0])
    return path.read_bytes()


@pytest.fixture(scope="module")
def folder(python, video, tmp_path_factory):
    """One folder of TFRecords: a plain file about pictures, a compressed one about sounds."""
    folder = tmp_path_factory.mktemp("tfrecords")
    conversations = json.dumps(
        [{"from": "human", "value": "Größe?"}, {"from": "gpt", "value": "Zwei."}]
    )
    seen = [
        {"id": "clip", "video": video, "caption": "Eine Kugel rollt."},
        {"id": 7, "video": video, "question": "Which colour?", "caption": "Red."},
        {"conversations": conversations, "unused": 0.5},
    ]
    heard = [
        {"id": name, "audio": make(), "caption": "Tones."} for name, (make, _) in KINDS.items()
    ]
    samples = tone(LEFT, np.arange(int(SECONDS * 22050)) / 22050).tolist()
    heard.append({"id": "samples", "audio": samples, "rate": 22050, "caption": "Tones."})
    heard.append(
        {"id": "both", "video": video, "audio": heard[1]["audio"], "caption": "A ball with tones."}
    )
    write_tfrecords(
        python,
        (folder / "set.tfrecord-00000-of-00002", "", seen),
        (folder / "set.tfrecord-00001-of-00002", "GZIP", heard),
    )
    (folder / "notes.txt").write_text("not read")
    return folder


@pytest.fixture(scope="module")
def packed(python, folder, tmp_path_factory):
    target = tmp_path_factory.mktemp("packs") / "pack"
    assert ingest(python, folder, target, "--dataset", "tones") == 0
    return open_source(target)


def numbers_by_id(source):
    return {source.read(number)["id"]: number for number in range(len(source))}


def samples_of(source, id, entry=0):
    """Floats of a packed sound, by the standard library."""
    content = source.media_bytes(numbers_by_id(source)[id])[entry]
    with wave.open(io.BytesIO(content)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16_000)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768


def test_records_and_media_come_out_as_they_went_in(packed, video):
    assert len(packed) == 3 + len(KINDS) + 2
    clip, question, text = (packed.read(number) for number in range(3))
    path = clip["video"]
    assert clip == {
        "id": "clip",
        "video": path,
        "dataset": "tones",
        "conversations": [
            {"from": "human", "value": "<video>\n"},
            {"from": "gpt", "value": "Eine Kugel rollt."},
        ],
    }
    assert (question["id"], question["video"]) == ("7", path)
    assert question["conversations"][0]["value"] == "<video>\nWhich colour?"
    assert text["id"] == "set.tfrecord-00000-of-00002-2"
    assert text["conversations"][0]["value"] == "Größe?"
    assert [packed.media_bytes(number) for number in range(3)] == [(video,), (video,), None]
    assert packed[0].media.paths == (path,)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_file_becomes_its_channels_mean_at_16_khz(packed, kind):
    """The oracle is the tones' formula at the new rate: it knows neither decoder nor resampler."""
    samples = samples_of(packed, kind)
    assert len(samples) == pytest.approx(SECONDS * 16_000, abs=1)
    times = np.arange(len(samples)) / 16_000
    wanted = (tone(LEFT, times) + tone(RIGHT, times)) / 2
    inside = slice(200, -200)  # at both ends the filter sees the silence beyond
    assert np.abs(samples - wanted)[inside].max() < KINDS[kind][1]


def test_samples_with_a_rate_are_resampled_likewise(packed):
    samples = samples_of(packed, "samples")
    wanted = tone(LEFT, np.arange(len(samples)) / 16_000)
    assert len(samples) == SECONDS * 16_000
    assert np.abs(samples - wanted)[200:-200].max() < 2 / 32768


def test_a_video_with_a_sound_names_both_and_equal_sounds_are_packed_once(packed, video):
    number = numbers_by_id(packed)["both"]
    record, sound = packed.read(number), packed.read(numbers_by_id(packed)["wav-16"])
    assert packed.media_bytes(number)[0] == video
    assert record["audio"] == sound["audio"] and record["audio"].endswith(".wav")
    assert record["conversations"][0]["value"] == "<video>\n"
    assert np.array_equal(samples_of(packed, "both", 1), samples_of(packed, "wav-16"))


def test_a_check_reads_what_is_seen_and_what_is_heard(packed):
    report = check(packed, "nowhere")
    assert not report.quarantine
    assert {checked.media for checked in report.checked} >= {"video", "audio", "av"}


def test_the_first_channel_can_be_taken_alone(python, folder, tmp_path):
    words = ["--first-channel", "--video-key", ""]
    assert ingest(python, f"{folder}/*-00001-*", tmp_path / "pack", *words) == 0
    samples = samples_of(open_source(tmp_path / "pack"), "wav-16")
    wanted = tone(LEFT, np.arange(len(samples)) / 16_000)
    assert np.abs(samples - wanted)[200:-200].max() < 2 / 32768


def test_what_cannot_be_decoded_is_named_and_left_out(python, video, tmp_path, capfd):
    whole = sound_file("flac", "flac", "s16")
    bad = {
        "cut": whole[: len(whole) // 2],
        "words": b"no sound at all",
        "head": b"RIFF",
    }
    examples = [{"id": id, "audio": sound, "caption": "Tones."} for id, sound in bad.items()]
    examples.append({"id": "kept", "video": video, "caption": "A ball."})
    file = tmp_path / "bad.tfrecord"
    write_tfrecords(python, (file, "ZLIB", examples))
    assert ingest(python, file, tmp_path / "one") == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith(f"vllama2 data: {file}, record 0 (id cut): the sound cannot be")
    assert ingest(python, file, tmp_path / "two", "--max-bad", 3) == 1
    out, err = capfd.readouterr()
    assert out.startswith("1 records with 1 media files") and "3 Examples left out" in out
    assert [line.split("(id ")[1].split(")")[0] for line in err.splitlines()] == list(bad)
    assert [record.id for record in open_source(tmp_path / "two")] == ["kept"]


# Run by the environment's Python: what does each reader say of each input?
COMPLAINTS = """
import json, sys
sys.path.append(sys.argv[1])
import tensorflow as tf
from vllama2_jax.data.tfio_ingest import examples_of, features_of, tfrecord_files

sequence = tf.train.SequenceExample()
sequence.feature_lists.feature_list["video"].feature.add()
readers = {"tfrecord_files": tfrecord_files, "examples_of": lambda file: list(examples_of(file))}
said = []
for reader, file in json.loads(sys.argv[2]):
    try:
        said.append(readers[reader](file))
    except ValueError as error:
        said.append(str(error))
for raw in (sequence.SerializeToString(), b"\\xff\\xff"):
    try:
        said.append(features_of(raw))
    except ValueError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_what_is_no_file_of_examples_is_said_in_one_line(python, folder, tmp_path):
    (tmp_path / "words").write_text("These are words and no records at all.")
    content = (folder / "set.tfrecord-00000-of-00002").read_bytes()
    (tmp_path / "cut").write_bytes(content[: 16 + int.from_bytes(content[:8], "little") + 100])
    expected = {
        ("tfrecord_files", "none"): "no such files; give a file, a glob, or a folder",
        ("tfrecord_files", ""): "no such files; .* with `tfrecord` in their names",
        ("tfrecord_files", "no/*"): "no such files",
        ("examples_of", "words"): "not a file of TFRecords",
        ("examples_of", "cut"): r"cannot be read behind 1 records \(truncated record",
    }
    inputs = json.dumps([(reader, f"{tmp_path}/{name}") for reader, name in expected])
    command = [python, "-I", "-c", COMPLAINTS, str(ROOT), inputs]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    *of_files, sequence, nonsense = json.loads(run.stdout)
    for (_, name), message, said in zip(expected, expected.values(), of_files, strict=True):
        assert said.startswith(f"{tmp_path}/{name}: ") and "\n" not in said
        assert re.search(message, said)
    assert "is it a SequenceExample?" in sequence and "is not a tf.train.Example" in nonsense
