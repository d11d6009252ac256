"""TFRecords to a pack, by TensorFlow and tensorflow-io in an environment of their own.

`tfio_job.py` starts this as a process of that environment's Python (docs/tfio.md). It reads
tf.train.Examples, decodes sounds and brings them to 16 kHz, and writes what `data pack` writes.
Video and image bytes pass through unopened. TensorFlow is imported where it is needed, so that the
rest can be tested without it.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from vllama2_jax.data.pack import PackWriter
from vllama2_jax.data.records import RecordError
from vllama2_jax.data.tfio_job import Job, Keys
from vllama2_jax.data.tfio_records import (
    Features,
    Sound,
    held,
    id_of_example,
    sound_of,
    take,
    wav_bytes,
)

_TENSORFLOW = ("2.16.", "2.17.")  # with others tensorflow-io 0.37.1 finds no native operations
_PATIENCE = 1000  # Examples among which a feature that somebody has typed must be seen


def main(text: str) -> int:
    """Do the job that `tfio_job.run_job` sends as JSON; returns the command's exit code."""
    job = Job(**json.loads(text))
    try:
        done = _with_tensorflow(job)
    except KeyboardInterrupt:
        return 130  # the command that waits for this process says so
    except Exception as error:
        if job.debug:
            raise
        line = " ".join(str(error).split())
        if not isinstance(error, (ValueError, OSError)) or not line:
            line = f"{type(error).__name__}: {line} (--debug shows the traceback)"
        print(f"vllama2 data: {line}", file=sys.stderr)
        return 2
    print(
        f"{done['records']} records with {done['media']} media files ({done['bytes']} bytes) in "
        f"{job.folder}; {done['left_out']} Examples left out"
    )
    return 1 if done["left_out"] else 0


def ingest(
    job: Job,
    examples: Iterable[tuple[str, int, bytes]],
    features_of: Callable[[bytes], Features],
    samples_of: Callable[[Sound], np.ndarray],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, int]:
    """Write Examples into a pack.

    Args:
      job: what is asked.
      examples: file, number in it and serialised Example, in order.
      features_of: an Example's features; raises ValueError.
      samples_of: float32 [samples] at 16 kHz of a sound; raises ValueError.
      progress: called with the number of Examples done.

    Returns:
      {"records", "media", "bytes", "left_out"}: the pack's, as `pack` counts them, and the number
      of Examples that were left out.

    Raises:
      RecordError: for an Example that cannot be used, after `job.max_bad` others.
      ValueError: if a feature that was typed is in none of them, or nothing is left.
    """
    keys, bad, done = Keys(**job.keys), 0, 0
    unseen = {kind: name for kind, name in job.keys.items() if name}
    with PackWriter(job.folder) as writer:
        for done, (file, number, raw) in enumerate(examples, start=1):
            id = ""
            try:
                features = features_of(raw)
                unseen = {kind: name for kind, name in unseen.items() if name not in features}
                if unseen and done == _PATIENCE:
                    break
                id = id_of_example(features, keys, f"{os.path.basename(file)}-{number}")
                sound = sound_of(features, keys, job.rate)
                wav = None if sound is None else wav_bytes(samples_of(sound))
                taken = take(features, keys, id, wav, prompt=job.prompt, dataset=job.dataset)
            except ValueError as error:
                bad += 1
                if bad > job.max_bad:
                    cause = f"{error}; --max-bad leaves such Examples out"
                    raise RecordError(file, number, id, cause) from None
                print(f"left out: {RecordError(file, number, id, str(error))}", file=sys.stderr)
                continue
            for path, content in taken.files:
                if path not in writer.places:
                    writer.add_media(path, content)
            for record in taken.records:
                writer.add(record, [path for path, _ in taken.files])
            progress(done)
        if done == bad:
            raise ValueError(f"{job.source}: no Examples that can be used, of {done}")
        if unseen:
            names = ", ".join(f"`{name}` (--{kind}-key)" for kind, name in unseen.items())
            raise ValueError(f"none of {done} Examples holds {names}; {held(features)}")
        return writer.finish(left_out=bad) | {"left_out": bad}


def _with_tensorflow(job: Job) -> dict[str, int]:
    remedy = "`make tfio` makes an environment that has it (Python 3.11 or 3.12)"
    try:
        import tensorflow as tf

        if not tf.__version__.startswith(_TENSORFLOW):
            version = tf.__version__
            raise ValueError(f"tensorflow-io does not work beside TensorFlow {version}; {remedy}")
        from vllama2_jax.data import tfio_audio
    except ImportError as error:
        raise ValueError(f"{sys.executable} lacks what is needed ({error}); {remedy}") from None

    def samples_of(sound: Sound) -> np.ndarray:
        if isinstance(sound.content, bytes):
            samples, rate = tfio_audio.decode(sound.content)
            channel = samples[:, 0] if job.first_channel else samples.mean(axis=1)
            return tfio_audio.resample(channel, rate)
        return tfio_audio.resample(sound.content, sound.rate)

    files = tfrecord_files(job.source)
    examples = ((file, *example) for file in files for example in examples_of(file))
    return ingest(job, examples, features_of, samples_of, _counter())


def tfrecord_files(source: str) -> list[str]:
    """Files that a path, a glob or a folder stands for, sorted; local or of a bucket.

    Raises:
      ValueError: if there are none.
    """
    import tensorflow as tf

    try:
        if tf.io.gfile.isdir(source):
            names = [name for name in tf.io.gfile.listdir(source) if "tfrecord" in name]
            files = [f"{source.rstrip('/')}/{name}" for name in names]
        else:
            files = [source] if tf.io.gfile.exists(source) else tf.io.gfile.glob(source)
    except tf.errors.OpError as error:
        raise ValueError(f"{source}: cannot be read ({error.message})") from None
    if not files:
        raise ValueError(
            f"{source}: no such files; give a file, a glob, or a folder of files with `tfrecord` "
            "in their names"
        )
    return sorted(files)


def examples_of(file: str) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each record of a TFRecord file, compressed or not.

    Raises:
      ValueError: for a file that is none, cannot be read or is damaged.
    """
    import tensorflow as tf

    number = -1
    try:
        dataset = tf.data.TFRecordDataset(file, _compression(file), buffer_size=8 << 20)
        for number, raw in enumerate(dataset.prefetch(1).as_numpy_iterator()):
            yield number, raw
    except tf.errors.OpError as error:
        message = (error.message or type(error).__name__).partition(" [Op:")[0].rpartition("}} ")[2]
        raise ValueError(
            f"{file}: cannot be read behind {number + 1} records ({message})"
        ) from None


def _compression(file: str) -> str:
    """How a file is compressed; its records' checksums tell."""
    import tensorflow as tf

    for kind in ("", "GZIP", "ZLIB"):
        try:
            next(iter(tf.data.TFRecordDataset(file, kind)), None)
            return kind
        except tf.errors.DataLossError:
            continue
    raise ValueError(f"{file}: not a file of TFRecords, or damaged where it begins")


def features_of(raw: bytes) -> Features:
    """Features of a serialised tf.train.Example, but for those without values.

    Raises:
      ValueError: for anything else.
    """
    import tensorflow as tf
    from google.protobuf.message import DecodeError
    from google.protobuf.unknown_fields import UnknownFieldSet

    try:
        example = tf.train.Example.FromString(raw)
    except DecodeError:
        raise ValueError("is not a tf.train.Example") from None
    if len(UnknownFieldSet(example)):  # such as the feature lists of a SequenceExample
        raise ValueError("holds more than a tf.train.Example; is it a SequenceExample?")
    features: dict[str, list[bytes] | np.ndarray] = {}
    for name, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        values = list(getattr(feature, kind).value) if kind else []
        if values and values != [b""]:
            types = {"int64_list": np.int64, "float_list": np.float32}
            features[name] = np.asarray(values, types[kind]) if kind in types else values
    return features


def _counter() -> Callable[[int], None]:
    """Shows on stderr, where somebody watches, how many Examples are done."""
    if not sys.stderr.isatty():
        return lambda done: None
    shown = 0.0

    def show(done: int) -> None:
        nonlocal shown
        if time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            print(f"\r{done} Examples", end="\r", file=sys.stderr, flush=True)

    return show
