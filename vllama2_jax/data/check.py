"""Is a file of records fit to train on? Every record and every media file is looked at.

`check` reads all records, probes each distinct media file once, in parallel and through guarded
decoders, and counts text tokens. What cannot be used is quarantined with its cause, never fatal.
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

from vllama2_jax.data.check_report import Checked, Quarantined, Report
from vllama2_jax.data.examples import text_tokens
from vllama2_jax.data.files import local_media
from vllama2_jax.data.records import KNOWN_KEYS, Media, Record, RecordError, id_of, parse_record
from vllama2_jax.data.sources import Source
from vllama2_jax.media import PAPER, ImageSpec, Limits, MediaError, MediaInfo
from vllama2_jax.media.guard import Decoder
from vllama2_jax.text import ChatTemplate, TemplateError, Tokenizer

# (what is done, unit=what is counted) -> a context of `update(done, total)`
Bar = Callable[..., contextlib.AbstractContextManager[Callable[[int, int], None]]]

# Frames are decoded to see that they can be, not to be looked at.
_SPEC = ImageSpec(16, "stretch", (0.5,) * 3, (0.5,) * 3)
# What a probe may find where a record says `image` or `video`. A GIF can be either.
_FITTING = {
    "image": ("image", "gif"),
    "video": ("video", "gif", "folder"),
    "audio": ("audio", "video"),
    "av": ("video", "gif", "folder"),
}


@contextlib.contextmanager
def _no_bar(label: str, unit: str):
    yield lambda done, total: None


def template_key(template: str | ChatTemplate) -> str:
    """A template's name; of a checkpoint's own, the sha256 of it and the tokens it refers to."""
    if isinstance(template, str):
        return template
    text = json.dumps([template.source, template.special_tokens])
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def check(
    source: Source,
    media_root: str | os.PathLike,
    *,
    tokenizer: Tokenizer | None = None,
    template: str | ChatTemplate | None = None,
    workers: int = 2,
    limits: Limits | None = None,
    bar: Bar = _no_bar,
) -> Report:
    """Look at every record and its media.

    Args:
      source: the records.
      media_root: folder that their paths are relative to.
      tokenizer, template: of the model to train, for the length index; without them there is none.
      workers: decoder subprocesses.
      limits: bounds of each read of media.
      bar: shows progress, like `progress.bar`.

    Raises:
      ValueError: if the source fails as a whole: a shard, or a file that changes meanwhile.
    """
    if workers < 1:
        raise ValueError(f"{workers} workers are too few; give at least 1")
    findings = _Findings()
    with bar("reading", unit="records") as progress:
        for number in range(len(source)):
            _read_one(source, number, tokenizer, template, findings)
            progress(number + 1, len(source))
    media_found, bad = {}, findings.bad
    with bar("probing", unit="media") as progress:
        for numbers, found in _probe_all(
            source, findings.records, media_root, workers, limits, progress
        ):
            for number in numbers:
                if isinstance(found, MediaError):
                    bad[number] = Quarantined(number, findings.ids[number], str(found))
                else:
                    media_found[number] = found
    checked = []
    for number, record in findings.records.items():
        media = record.media.kind if record.media else "text"
        seconds, silent = media_found.get(number, _Found(None))
        checked.append(
            Checked(
                record.dataset,
                media,
                record.kind,
                number in bad,
                seconds,
                findings.tokens.get(number),
                silent,
            )
        )
    usable = [None if n in bad else findings.tokens.get(n) for n in range(len(source))]
    return Report(
        file=source.path,
        fingerprint=source.fingerprint,
        ids=findings.ids,
        checked=checked,
        quarantine=[bad[number] for number in sorted(bad)],
        ignored_keys=dict(findings.ignored_keys),
        dropped_sentences=findings.dropped_sentences,
        tokenizer=None if tokenizer is None else tokenizer.fingerprint(),
        template=None if tokenizer is None else template_key(template),
        lengths=None if tokenizer is None else usable,
    )


class _Found(NamedTuple):
    """What probing media has found.

    Attributes:
      seconds: of the part that is asked for; None for what knows no time.
      silent: whether sound is asked for of a video that has none.
    """

    seconds: float | None
    silent: bool = False


@dataclasses.dataclass
class _Findings:
    """What reading all records has found."""

    records: dict[int, Record] = dataclasses.field(default_factory=dict)
    tokens: dict[int, int] = dataclasses.field(default_factory=dict)
    bad: dict[int, Quarantined] = dataclasses.field(default_factory=dict)
    ids: list[str] = dataclasses.field(default_factory=list)
    ignored_keys: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    dropped_sentences: int = 0


def _read_one(source: Source, number: int, tokenizer, template, findings: _Findings):
    data = None
    try:
        data = source.read(number)
        record = parse_record(data, source.path, number)
        if tokenizer is not None:
            findings.tokens[number] = text_tokens(record, template, tokenizer)
        findings.records[number] = record
        findings.ignored_keys.update(name for name in data if name not in KNOWN_KEYS)
        findings.dropped_sentences += len(data["conversations"]) % 2
    except (RecordError, TemplateError) as error:
        cause = getattr(error, "cause", str(error))
        findings.bad[number] = Quarantined(number, id_of(data) or str(number), cause)
    findings.ids.append(id_of(data) or str(number))


def _probe_all(source, records, media_root, workers, limits, progress):
    """Yield (numbers of the records, what is found or a `MediaError`) of each distinct media."""
    users = collections.defaultdict(list)
    for number, record in records.items():
        if record.media:
            users[record.media].append(number)
    prober = _Prober(source, media_root, limits or Limits())
    pool = ThreadPoolExecutor(workers)
    try:
        jobs = {pool.submit(prober, n[0], media): media for media, n in users.items()}
        for done, job in enumerate(as_completed(jobs), start=1):
            error = job.exception()
            if error is not None and not isinstance(error, MediaError):
                raise error
            yield users[jobs[job]], error or job.result()
            progress(done, len(jobs))
    finally:
        # After an interrupt, too, without waiting for what is being decoded.
        pool.shutdown(wait=False, cancel_futures=True)
        prober.close()


class _Prober:
    """Looks into media; each thread that calls it has a decoder subprocess of its own."""

    def __init__(self, source: Source, media_root, limits: Limits):
        self._source, self._root, self._limits = source, media_root, limits
        self._own, self._decoders = threading.local(), []

    def close(self):
        """End all decoders for good."""
        for decoder in self._decoders:
            decoder.close_at_exit()

    def __call__(self, number: int, media: Media) -> _Found:
        """Probe a record's media, or raise a `MediaError`."""
        if not hasattr(self._own, "decoder"):
            self._own.decoder = Decoder()
            self._decoders.append(self._own.decoder)
        ask = self._own.decoder.ask
        reading = {"spec": dataclasses.asdict(_SPEC), "preset": dataclasses.asdict(PAPER)}
        with local_media(self._source, number, media, self._root) as places:
            if media.sound is not None:
                self._probe(ask, media.track(places), "audio")
            place = media.pictures(places)
            if not isinstance(place, str):
                ask("stills", place, self._limits, **reading)
                return _Found(None, media.kind == "av" and media.sound is None)
            info = self._probe(ask, place, media.kind)
            silent = media.kind == "av" and media.sound is None and not info.has_audio
            if info.seconds is None or (media.start is None and media.end is None):
                return _Found(info.seconds, silent)
            if media.seen:
                part = {"num_frames": 1, "start": media.start, "end": media.end}
                ask("clip", [place], self._limits, **reading, **part)
            first, last = max(media.start or 0.0, 0.0), info.seconds
            if first >= last:
                raise MediaError(
                    place, f"ends at {last:.2f} s, before its part begins", "mend `start`"
                )
            last = min(last if media.end is None else media.end, last)
            return _Found(max(last - first, 0.0), silent)

    def _probe(self, ask, place: str, kind: str) -> MediaInfo:
        info = MediaInfo(**ask("probe", [place], self._limits)[0])
        if info.kind not in _FITTING[kind]:
            other = info.kind if info.kind in ("image", "audio") else "video"
            cause = f"is of kind {info.kind}, not {kind}"
            raise MediaError(place, cause, f"name it under the key `{other}`")
        if kind == "audio" and not info.has_audio:
            raise MediaError(place, "has no sound track", "leave the record out")
        return info
