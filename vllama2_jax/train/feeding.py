"""A run's data: from its configuration to the batches of every step."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from vllama2_jax.checkpoints import ModelCard
from vllama2_jax.data.assemble import Assembler, ClipReader, Hearing, SoundReader
from vllama2_jax.data.check_report import read_usable
from vllama2_jax.data.examples import RecordFormat, Subset
from vllama2_jax.data.frame_cache import CachedClipReader
from vllama2_jax.data.index import Index, joint_datasets, load_or_build
from vllama2_jax.data.mixture import Mixture, joint_mixture
from vllama2_jax.data.pipeline import Feed
from vllama2_jax.data.schedule import Schedule
from vllama2_jax.data.sources import open_source
from vllama2_jax.data.toybox.source import ToyboxListener, ToyboxReader, ToyboxSource
from vllama2_jax.media import Limits
from vllama2_jax.models.axes import Layout
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.vllama2 import Batch
from vllama2_jax.parallel.placing import place_batch, row_share
from vllama2_jax.progress import bar
from vllama2_jax.text import Tokenizer, choose_template
from vllama2_jax.train.config import (
    DataConfig,
    SourceConfig,
    ToyboxConfig,
    TrainConfig,
    ValidationConfig,
)

_WINDOW = 1 << 14
_LANES = 128  # attention kernels take lengths that are multiples of it


class Feeding(NamedTuple):
    """What a run reads.

    Attributes:
      schedule: its steps.
      feed: their batches.
      datasets: names that `Batch.dataset_ids` numbers.
      fingerprints: {source's name: sha256} of the records that are read.
      layout: how batches are split over devices; None is the default device alone.
    """

    schedule: Schedule
    feed: Feed
    datasets: tuple[str, ...]
    fingerprints: dict[str, str]
    layout: Layout | None = None

    def batches(self, start: int) -> Iterator[Batch]:
        """Batches on the devices, from step `start` on; of several processes each reads a share."""
        rows = self.schedule.rows
        for host in self.feed.batches(start):
            batch = Batch(**host.arrays)
            yield place_batch(self.layout, batch, rows) if self.layout else jax.device_put(batch)

    def record_ids(self, step: int) -> list[str]:
        """Ids of a step's records, read again."""
        whole = dataclasses.replace(self.feed.assembler, host=0, hosts=1)
        return [id for row in whole(self.schedule[step]).records for id in row]


class _Records(NamedTuple):
    """An opened source."""

    source: Subset
    index: Index
    reader: ClipReader | ToyboxReader
    listener: SoundReader | ToyboxListener | None
    fingerprint: str


def make_feeding(
    data: DataConfig,
    card: ModelCard,
    tokenizer: Tokenizer,
    *,
    rows: int,
    seed: int,
    index_folder: str | os.PathLike,
    epochs: int | None = None,
    steps: int | None = None,
    held_out: ValidationConfig | None = None,
    layer_drop: float | None = None,
    layout: Layout | None = None,
) -> Feeding:
    """Open the sources, index them, and plan every step.

    Args:
      data: what to read.
      card: of the model to train; its preset says how media are read.
      tokenizer: of the model.
      rows: of a step.
      seed: of every order.
      index_folder: where length indices are kept.
      epochs, steps: how long, one of them.
      held_out: read these sources instead, each once and in this process.
      layer_drop: of the audio tower, which validation never has; None is the tower's own.
      layout: how batches are split over devices and processes.

    Raises:
      ValueError: if the data cannot be read, or the configuration cannot be meant.
    """
    sources = data.sources
    if held_out is not None:
        data = dataclasses.replace(data, mix="counts", workers=0)
        sources = tuple(dataclasses.replace(s, share=None) for s in held_out.sources)
        epochs = 1
    max_length = longest_row(data, card.config)
    form = RecordFormat(
        tokenizer=tokenizer,
        template=card.template or choose_template(card.config.decoder.family, tokenizer),
        style=data.style,
        media_tokens=card.config.num_media_tokens(),
        max_tokens=data.max_tokens,
        max_length=max_length,
        sound_tokens=card.config.num_sound_tokens,
    )
    if not sources:
        raise ValueError("nothing to train on; name a file of records (--data FILE)")
    limit = held_out.max_records if held_out else None
    opened = [_open(source, form, card, index_folder, limit, data.workers) for source in sources]
    indices = [records.index for records in opened]
    names, codes = joint_datasets(indices)
    # What no record has, towers and connectors need not run for.
    max_clips = data.max_clips if any(index.clips.any() for index in indices) else 0
    max_sounds = data.max_clips if any(index.sounds.any() for index in indices) else 0
    if max_sounds and card.sound is None:
        raise ValueError(
            f"records hold sound, and the model {card.config.name} does not hear; start from one "
            "that does, such as 2.1-7B-AV, or take `audio` out of them"
        )
    for clips, sounds in sorted(set().union(*(index.kinds for index in indices))):
        form.check_room(clips, sounds)
    shares = [source.share for source in sources]
    mixture = _mixture(data, [len(index) for index in indices], shares, seed)
    if epochs is not None and not mixture.finite:
        raise ValueError("a mixture by weights has no epochs; say how many steps to take (--steps)")
    schedule = Schedule(
        mixture,
        [form.slots(index.text_tokens, index.clips, index.sounds) for index in indices],
        [index.clips for index in indices],
        [index.sounds for index in indices],
        rows=rows,
        max_length=max_length,
        max_clips=max_clips,
        max_sounds=max_sounds,
        packing=data.packing,
        buckets=row_lengths(data, card.config),
        epochs=None if steps else epochs,
        num_steps=steps,
        window=_window(mixture.round_length, rows),
    )
    host, hosts = row_share(layout.sharding(("batch",), (rows,)), rows) if layout else (0, 1)
    assembler = Assembler(
        host=host,
        hosts=hosts,
        sources=tuple(records.source for records in opened),
        record_format=form,
        readers=tuple(records.reader for records in opened),
        num_frames=card.config.num_frames,
        image_size=card.image.size,
        max_clips=max_clips,
        hearing=_hearing(card, opened, max_sounds, 0.0 if held_out else layer_drop, seed),
        dataset_codes=codes,
    )
    # A wrong media root must not pass for bad luck.
    total = sum(map(len, indices))
    few = max(total // 4, min(1, total - 1))
    feed = Feed(schedule, assembler, workers=data.workers, max_faults=min(data.max_faults, few))
    fingerprints = {
        source.name: records.fingerprint for source, records in zip(sources, opened, strict=True)
    }
    return Feeding(schedule, feed, names, fingerprints, layout)


def _hearing(card, opened, max_sounds: int, layer_drop: float | None, seed: int) -> Hearing | None:
    if not max_sounds:
        return None
    tower = card.config.audio
    return Hearing(
        listeners=tuple(records.listener for records in opened),
        num_frames=tower.num_frames,
        max_sounds=max_sounds,
        num_layers=tower.num_layers,
        layer_drop=tower.layer_drop if layer_drop is None else layer_drop,
        seed=seed,
    )


def _window(epoch: int, rows: int) -> int:
    """Positions that are planned together.

    Whole epochs where they are short: all records come equally often then, also in a run of few
    steps. But some steps' worth, since records of like length share a step.
    """
    return min(epoch * -(-8 * rows // epoch), _WINDOW) if epoch < _WINDOW else _WINDOW


def feeding_of(
    config: TrainConfig,
    card: ModelCard,
    tokenizer: Tokenizer,
    index_folder: str | os.PathLike,
    layout: Layout | None = None,
) -> Feeding:
    """What a run with this configuration reads; the arguments are those of `make_feeding`."""
    return make_feeding(
        config.data,
        card,
        tokenizer,
        rows=config.rows,
        seed=config.seed,
        index_folder=index_folder,
        epochs=config.epochs,
        steps=config.steps,
        layer_drop=config.layer_drop,
        layout=layout,
    )


def longest_row(data: DataConfig, network: VLlama2Config) -> int:
    """Slots of the longest rows: room for all ids of a record, and for its media."""
    beside = network.num_media_tokens() + network.num_sound_tokens - 1
    return data.max_length or _rounded(beside + data.max_tokens)


def row_lengths(data: DataConfig, network: VLlama2Config) -> tuple[int, ...]:
    """Slots that rows may have."""
    media = network.num_media_tokens(), network.num_sound_tokens
    longest = longest_row(data, network)
    return data.buckets or default_buckets(media[0], data.max_tokens, longest, media[1])


def default_buckets(
    media_tokens: int, max_tokens: int, max_length: int, sound_tokens: int = 0
) -> tuple[int, ...]:
    """Lengths of rows for short text, media with short text, with longer text, and the longest.

    Media are a clip; of a model that hears, a clip or a sound, and both.
    """
    both = media_tokens + sound_tokens
    lengths = (max_tokens // 4, both + max_tokens // 8, both + max_tokens // 2)
    if sound_tokens:
        lengths = (*lengths, max(media_tokens, sound_tokens) + max_tokens // 8)
    rounded = {length for length in map(_rounded, lengths) if length < max_length}
    return (*sorted(rounded), max_length)


def _rounded(length: int) -> int:
    return -(-length // _LANES) * _LANES


def _open(
    config: SourceConfig | ToyboxConfig,
    form: RecordFormat,
    card: ModelCard,
    index_folder,
    limit: int | None,
    workers: int,
) -> _Records:
    if isinstance(config, ToyboxConfig):
        options = dataclasses.asdict(config)
        source = ToyboxSource(**{f.name: options[f.name] for f in dataclasses.fields(ToyboxSource)})
        reader, report = ToyboxReader(card.image.size, card.config.num_frames), ""
        listener = ToyboxListener(card.sound.seconds) if card.sound else None
    else:
        source, report = open_source(config.file), config.report
        how = dict(
            preset=card.preset,
            root=config.media_root or os.path.dirname(config.file) or ".",
            # Each worker has a core of its own, hardly more.
            limits=Limits(max_threads=1 if workers else 0),
        )
        reader = ClipReader(spec=card.image, num_frames=card.config.num_frames, **how)
        listener = SoundReader(spec=card.sound, **how) if card.sound else None
        if config.frames:
            reader = CachedClipReader(config.frames, source, reader)
    with bar(f"indexing {config.name}", unit="records") as progress:
        index = load_or_build(
            index_folder,
            source,
            form,
            default_dataset=config.name,
            report=report or None,
            progress=progress,
        )
    numbers = np.arange(len(source))
    if report:
        numbers = read_usable(report, source.fingerprint)
    numbers = numbers[:limit]
    digest = hashlib.sha256(source.fingerprint.encode() + numbers.tobytes()).hexdigest()
    return _Records(Subset(source, numbers), index.take(numbers), reader, listener, digest)


def _mixture(data: DataConfig, sizes: Sequence[int], shares: Sequence, seed: int) -> Mixture:
    if data.mix == "counts":
        counts = [
            size if share is None else int(share) for size, share in zip(sizes, shares, strict=True)
        ]
        return Mixture.by_counts(sizes, counts, seed)
    if data.mix == "weights":
        if None in shares:
            raise ValueError("a mixture by weights needs a share of every source; one has none")
        return Mixture.by_weights(sizes, shares, seed)
    if len(sizes) != 3:
        raise ValueError(
            f"mix 'joint' needs three sources, audio-video, audio and video; there are {len(sizes)}"
        )
    return joint_mixture(*sizes, seed, original=data.shuffled_once)
