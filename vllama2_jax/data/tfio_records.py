"""From the features of a tf.train.Example to records and their media; needs no TensorFlow."""

import hashlib
import io
import json
import wave
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vllama2_jax.data.records import RecordError, parse_record
from vllama2_jax.data.tfio_job import Keys
from vllama2_jax.text import AUDIO

RATE = 16_000  # hertz of a packed sound
# Values by name, none of them empty: bytes in a list, whole numbers and floats in an array.
Features = Mapping[str, list[bytes] | np.ndarray]

# Media that an Example holds as they are in files.
_KINDS = ("video", "image")
# Suffixes are for people: readers look at the content first. (head, where it stands, suffix)
_HEADS = (
    (b"ftyp", 4, ".mp4"),
    (b"\x1a\x45\xdf\xa3", 0, ".webm"),
    (b"AVI ", 8, ".avi"),
    (b"GIF8", 0, ".gif"),
    (b"\x89PNG", 0, ".png"),
    (b"\xff\xd8\xff", 0, ".jpg"),
    (b"WEBP", 8, ".webp"),
)


class Sound(NamedTuple):
    """A sound as an Example holds it.

    Attributes:
      content: bytes of a file, or float32 [samples].
      rate: hertz of samples; None for a file, which says it itself.
    """

    content: bytes | np.ndarray
    rate: int | None


class Taken(NamedTuple):
    """What one Example gives.

    Attributes:
      records: LLaVA-style JSON.
      files: (path, content) of the media that every one of the records names, in their order.
    """

    records: list[dict]
    files: list[tuple[str, bytes]]


def id_of_example(features: Features, keys: Keys, otherwise: str) -> str:
    """The id of an Example's record; `otherwise` where it holds none.

    Raises:
      ValueError: for one that is neither text nor a whole number.
    """
    values = features.get(keys.id)
    if values is None:
        return otherwise
    if len(values) != 1 or not (isinstance(values, list) or values.dtype.kind == "i"):
        raise ValueError(f"`{keys.id}` must be one text or one whole number; {held(features)}")
    return str(_texts(features, keys.id)[0] if isinstance(values, list) else values[0])


def sound_of(features: Features, keys: Keys, rate: int | None = None) -> Sound | None:
    """An Example's sound, None where it holds none.

    Args:
      features: of the Example.
      keys: their names.
      rate: hertz of samples, for an Example that does not say it.

    Raises:
      ValueError: for samples that are no floats, or of which nobody says the rate.
    """
    values = features.get(keys.audio)
    if values is None:
        return None
    if isinstance(values, list):
        if len(values) != 1:
            raise ValueError(f"`{keys.audio}` must be one sound file, not {len(values)}")
        return Sound(values[0], None)
    if values.dtype.kind != "f":
        raise ValueError(
            f"`{keys.audio}` holds whole numbers; samples are floats in [-1, 1], or the bytes of a "
            "sound file"
        )
    told = features.get(keys.rate)
    if told is None and rate is None:
        raise ValueError(
            f"`{keys.audio}` holds samples but nothing says their rate; name its feature with "
            f"--rate-key, or give it with --rate; {held(features)}"
        )
    if told is not None:
        if isinstance(told, list) or len(told) != 1 or not float(told[0]).is_integer():
            raise ValueError(f"`{keys.rate}` must be one whole number of hertz")
        rate = int(told[0])
    return Sound(values, rate)


def wav_bytes(samples: np.ndarray) -> bytes:
    """A 16-bit mono wav file of 16 kHz.

    Args:
      samples: floats [samples]; what lies outside [-1, 1) is clipped.

    Raises:
      ValueError: for no samples, or some that are not finite.
    """
    if not samples.size or not np.isfinite(samples).all():
        raise ValueError("the sound holds no samples, or some that are not finite")
    whole = np.rint(samples * 32768.0).clip(-32768, 32767).astype("<i2")
    content = io.BytesIO()
    with wave.open(content, "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(whole.tobytes())
    return content.getvalue()


def take(
    features: Features,
    keys: Keys,
    id: str,
    wav: bytes | None = None,
    *,
    prompt: str = "",
    dataset: str = "",
) -> Taken:
    """Records of an Example, and their media.

    Media are named after their content, so that the same bytes are packed once.

    Args:
      features: of the Example.
      keys: their names.
      id: of the record; of several, the beginning of their ids.
      wav: the Example's sound as `wav_bytes` gives it.
      prompt: what is asked where a caption has no question.
      dataset: where the records say that they are from.

    Raises:
      ValueError: for what makes no record, naming the features held.
    """
    try:
        files, named = _media(features, keys, wav)
        conversations = _conversations(features, keys, list(named), prompt)
        records = []
        for number, sentences in enumerate(conversations):
            own = f"{id}-{number}" if len(conversations) > 1 else id
            data = {"id": own, **named, "dataset": dataset, "conversations": sentences}
            records.append(_checked({name: value for name, value in data.items() if value != ""}))
    except ValueError as error:
        raise ValueError(f"{error}; {held(features)}") from None
    return Taken(records, files)


def held(features: Features) -> str:
    """The features of an Example in words."""
    kinds = {"i": "whole numbers", "f": "floats"}
    words = [
        f"{name} ({'bytes' if isinstance(values, list) else kinds[values.dtype.kind]})"
        for name, values in sorted(features.items())
    ]
    return f"the Example holds {', '.join(words) or 'nothing'}"


def _bytes(features: Features, name: str) -> list[bytes]:
    values = features.get(name, [])
    if not isinstance(values, list):
        raise ValueError(f"`{name}` must be bytes")
    return values


def _texts(features: Features, name: str) -> list[str]:
    try:
        return [value.decode() for value in _bytes(features, name)]
    except UnicodeDecodeError:
        raise ValueError(f"`{name}` is not text (UTF-8)") from None


def _media(features, keys: Keys, wav: bytes | None) -> tuple[list[tuple[str, bytes]], dict]:
    """Media with their paths, and what a record names of them by their kinds."""
    files, named = [], {}
    for kind in _KINDS:
        if contents := _bytes(features, getattr(keys, kind)):
            as_image = kind == "image" or len(contents) > 1
            paths = [_path(content, ".jpg" if as_image else ".mp4") for content in contents]
            named[kind] = paths if len(paths) > 1 else paths[0]
            files += zip(paths, contents, strict=True)
    if wav is not None:
        named["audio"] = _path(wav, ".wav")
        files.append((named["audio"], wav))
    return files, named


def _path(content: bytes, otherwise: str) -> str:
    suffixes = [end for head, at, end in _HEADS if content[at : at + len(head)] == head]
    return hashlib.sha256(content).hexdigest()[:32] + (suffixes[0] if suffixes else otherwise)


def _conversations(features, keys: Keys, kinds: Sequence[str], prompt: str) -> list[list[dict]]:
    """Sentences of each record."""
    told = _texts(features, keys.conversations)
    if told:
        if len(told) != 1:
            raise ValueError(f"`{keys.conversations}` must be one value, not {len(told)}")
        try:
            return [json.loads(told[0])]
        except ValueError as error:
            raise ValueError(f"`{keys.conversations}` is not JSON ({error})") from None
    answers, questions = _texts(features, keys.caption), _texts(features, keys.question)
    if not answers:
        raise ValueError(f"has no words: neither `{keys.caption}` nor `{keys.conversations}`")
    if questions and len(questions) != len(answers):
        raise ValueError(
            f"`{keys.question}` has {len(questions)} values, `{keys.caption}` {len(answers)}"
        )
    if not questions and not kinds:
        raise ValueError(f"has a caption of nothing: neither media nor `{keys.question}`")
    # A video with its sound has one placeholder, as in the original.
    tag = f"<{kinds[0]}>" if kinds else ""
    conversations = []
    for question, answer in zip(questions or [prompt] * len(answers), answers, strict=True):
        if tag not in question:
            question = f"{tag}\n{question}"
        conversations.append(
            [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        )
    return conversations


def _checked(data: dict) -> dict:
    """The record, if it can be used.

    `parse_record` refuses sounds so far, so it judges what the record is without its sound.
    """
    if "audio" in data and "image" in data:
        raise ValueError("holds an image and a sound; a sound stands alone or with a video")
    seen = {name: value for name, value in data.items() if name != "audio"}
    alone = "audio" in data and "video" not in data
    if alone:
        seen["conversations"] = json.loads(json.dumps(data["conversations"]).replace(AUDIO, ""))
    try:
        parse_record(seen, "", 0)
    except RecordError as error:
        raise ValueError(error.cause) from None
    if alone:
        holders = [s["from"] for s in data["conversations"] if AUDIO in s["value"]]
        if holders != ["human"]:
            raise ValueError(f"one question must hold {AUDIO}, and no answer; {holders} do")
    return data
