"""One host's share of a step: its records read, said, decoded and put into arrays.

Grain's workers run this, so it imports no JAX.
"""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vllama2_jax.data.collate import NOTHING, Part, pack_clips, pack_rows, pack_sounds
from vllama2_jax.data.examples import RecordFormat
from vllama2_jax.data.files import local_media
from vllama2_jax.data.records import Media, RecordError
from vllama2_jax.data.schedule import Step
from vllama2_jax.media import (
    NUM_BINS,
    REFERENCE,
    Clip,
    ImageSpec,
    Limits,
    MediaError,
    MediaPreset,
    SoundSpec,
    load_clip,
    load_sound,
)


class Fault(NamedTuple):
    """A record that teaches nothing, because it or its media cannot be read.

    Attributes:
      source, number: its place in the mixture.
      record: its id.
      dataset: where it comes from.
      reason: what is wrong, where, and what to do.
    """

    source: int
    number: int
    record: str
    dataset: str
    reason: str


class HostBatch(NamedTuple):
    """One host's rows of a step.

    Attributes:
      step: its number, from 0.
      arrays: NumPy arrays by the names of the fields of `models.vllama2.Batch`; the media's are
        None for rows that hold none.
      records: ids of each row's records; number s - 1 is that of segment s.
      datasets: their datasets, likewise.
      faults: of this batch.
    """

    step: int
    arrays: dict[str, np.ndarray | None]
    records: tuple[tuple[str, ...], ...]
    datasets: tuple[tuple[str, ...], ...]
    faults: tuple[Fault, ...]


@dataclasses.dataclass(frozen=True)
class ClipReader:
    """Reads the pictures of records from files.

    Attributes:
      spec: the tower's input.
      num_frames: time steps of a clip.
      preset: the numeric quirks; training on conversations pads to squares.
      root: folder that relative paths start from.
      limits: bounds of a read.
    """

    spec: ImageSpec
    num_frames: int
    preset: MediaPreset = REFERENCE
    root: str = ""
    limits: Limits = dataclasses.field(default_factory=Limits)

    def __call__(self, source: Any, number: int, media: Media) -> Clip:
        """The clip of a record, whose media lie in files or in its `sources.Source`.

        Raises:
          MediaError: naming the file, what is wrong and what to do.
        """
        with local_media(source, number, media, self.root) as places:
            clip = load_clip(
                media.pictures(places),
                spec=self.spec,
                num_frames=self.num_frames,
                preset=self.preset,
                start=media.start,
                end=media.end,
                limits=self.limits,
            )
        if len(clip.frame_index) != self.num_frames:
            raise MediaError(
                media.paths[0],
                f"gives {len(clip.frame_index)} time steps, the model takes {self.num_frames}",
                "list that many frames, or raise the preset's max_frames",
            )
        return clip


@dataclasses.dataclass(frozen=True)
class SoundReader:
    """Reads the sound of records from files.

    Attributes:
      spec: the tower's input.
      preset: the numeric quirks.
      root: folder that relative paths start from.
      limits: bounds of a read.
    """

    spec: SoundSpec
    preset: MediaPreset = REFERENCE
    root: str = ""
    limits: Limits = dataclasses.field(default_factory=Limits)

    def __call__(self, source: Any, number: int, media: Media, seed: int) -> np.ndarray:
        """The filter bank of a record's sound, float32 [frames, 128].

        A video without a track is heard as silence, as in the original's joint training.

        Args:
          source: of the record.
          number: of the record there.
          media: of the record.
          seed: of a stretch at random, where the preset hears one.

        Raises:
          MediaError: naming the file, what is wrong and what to do.
        """
        with local_media(source, number, media, self.root) as places:
            sound = load_sound(
                media.track(places),
                spec=self.spec,
                preset=self.preset,
                joint=media.seen,
                start=media.start,
                end=media.end,
                seed=seed,
                silence=media.seen and media.sound is None,
                limits=self.limits,
            )
        return sound.bank


@dataclasses.dataclass(frozen=True)
class Hearing:
    """What the sound of a step needs.

    Attributes:
      listeners: of each source (source, number, media, seed) to the filter bank, like
        `SoundReader`; raises ValueError.
      num_frames: of a filter bank.
      max_sounds: slots of a row for sounds.
      num_layers: of the audio tower.
      layer_drop: probability with which a step leaves out a layer.
      seed: decides which.
    """

    listeners: tuple[Callable[[Any, int, Media, int], np.ndarray], ...]
    num_frames: int
    max_sounds: int
    num_layers: int = 0
    layer_drop: float = 0.0
    seed: int = 0

    def kept_layers(self, step: int) -> np.ndarray:
        """bool [num_layers]: which layers a step does not leave out."""
        drawn = np.random.default_rng((self.seed, step)).random(self.num_layers)
        return drawn > self.layer_drop


@dataclasses.dataclass(frozen=True)
class Assembler:
    """Makes one host's batch of a step; runs in Grain's workers.

    What cannot be read keeps its place in its row with weight zero and is told as a `Fault`: it
    neither shifts what other rows hold nor passes in silence.

    Attributes:
      sources: of the mixture; each gives a `records.Record` by number.
      record_format: how records are said.
      readers: of each source (source, number, media) to the clip, like `ClipReader`; raises
        ValueError.
      num_frames, image_size: time steps of a clip, pixels of a frame's side.
      max_clips: clip slots of a row; 0 is rows without pictures and their arrays.
      host, hosts: which rows of a step are made here: an equal share, in order.
      dataset_codes: of each source int [records], the datasets of its records by number, as
        `index.joint_datasets` gives them; with it the arrays hold "dataset_ids", int32 [B, L].
      hearing: sounds of the rows; None is rows without them and their arrays.
    """

    sources: tuple[Any, ...]
    record_format: RecordFormat
    readers: tuple[Callable[[Any, int, Media], Clip], ...]
    num_frames: int
    image_size: int
    max_clips: int
    host: int = 0
    hosts: int = 1
    dataset_codes: tuple[np.ndarray, ...] | None = None
    hearing: Hearing | None = None

    def __post_init__(self):
        if not 0 <= self.host < self.hosts:
            raise ValueError(f"host {self.host} is not one of {self.hosts}, counted from 0")
        if self.dataset_codes is not None:
            sizes, coded = (tuple(map(len, of)) for of in (self.sources, self.dataset_codes))
            if sizes != coded:
                raise ValueError(
                    f"the dataset codes cover {coded} records, the sources hold {sizes}; "
                    "build the length index anew"
                )

    @property
    def max_sounds(self) -> int:
        """Slots of a row for sounds."""
        return self.hearing.max_sounds if self.hearing else 0

    @property
    def media_bytes(self) -> int:
        """Of a row's arrays of pictures and sound."""
        pictures = self.max_clips * self.num_frames * 3 * self.image_size**2
        banks = self.hearing.num_frames * NUM_BINS * 4 if self.hearing else 0
        return pictures + self.max_sounds * banks

    def __call__(self, step: Step) -> HostBatch:
        """The batch.

        Raises:
          ValueError: if records do not fit their row, since the length index is stale.
        """
        share = len(step.rows) // self.hosts
        own = step.rows[self.host * share : (self.host + 1) * share]
        faults: list[Fault] = []
        rows, records, datasets = [], [], []
        for row in own:
            found = [self._part(step.number, *place, faults) for place in row]
            rows.append([part for part, _, _ in found])
            records.append(tuple(id for _, id, _ in found))
            datasets.append(tuple(name for _, _, name in found))
            slots = sum(len(part.example.tokens) for part in rows[-1])
            if slots > step.length:
                raise ValueError(
                    f"the records {', '.join(records[-1])} take {slots} slots, more than the "
                    f"{step.length} that the length index planned; build the index anew"
                )
        arrays = pack_rows(
            rows,
            step.length,
            self.max_clips,
            self.record_format.media_tokens,
            self.record_format.sound_tokens,
        )
        if self.dataset_codes is not None:
            arrays["dataset_ids"] = self._dataset_ids(own, arrays["segment_ids"])
        if self.max_clips:
            arrays |= pack_clips(rows, self.max_clips, self.num_frames, self.image_size)
        else:
            arrays |= {"frames": None, "clip_frames": None, "clip_mask": None}
        if self.hearing:
            arrays |= pack_sounds(rows, self.hearing.max_sounds, self.hearing.num_frames)
            kept = self.hearing.kept_layers(step.number)
            arrays["audio_keep"] = np.tile(kept, (len(rows), 1))
        return HostBatch(step.number, arrays, tuple(records), tuple(datasets), tuple(faults))

    def _dataset_ids(self, rows, segment_ids: np.ndarray) -> np.ndarray:
        """The code of each slot's dataset, int32 [B, L]; 0 at padding."""
        out = np.zeros_like(segment_ids)
        for i, row in enumerate(rows):
            codes = [self.dataset_codes[source][number] for source, number in row]
            out[i] = np.asarray([0, *codes], np.int32)[segment_ids[i]]
        return out

    def read_media(
        self, source: int, number: int, media: Media | None, seed: int
    ) -> tuple[Clip | None, np.ndarray | None]:
        """The clip and the filter bank of a record's media, None for what they do not have.

        Raises:
          ValueError: naming the file, what is wrong and what to do.
        """
        clip = bank = None
        place = (self.sources[source], number, media)
        if media is not None and media.seen:
            clip = self.readers[source](*place)
        if media is not None and media.heard:
            bank = self.hearing.listeners[source](*place, seed)
        return clip, bank

    def _part(
        self, step: int, source: int, number: int, faults: list[Fault]
    ) -> tuple[Part, str, str]:
        """What a record gives, its id and its dataset; a fault is added where one is met."""
        example, media, clip, bank = NOTHING, None, None, None
        try:
            record = self.sources[source][number]
        except RecordError as error:  # another error is one of the source: nothing in it is sure
            name = error.id or f"record {number} of source {source}"
            faults.append(Fault(source, number, name, "", str(error)))
            return Part(example), name, ""
        try:
            example, media = self.record_format.supervised(record), record.media
            # Another stretch of long sound in each epoch, the same wherever the step is made.
            seed = zlib.crc32(f"{step}/{source}/{number}".encode())
            clip, bank = self.read_media(source, number, media, seed)
        except ValueError as error:
            reason = " ".join(str(error).split())
            faults.append(Fault(source, number, record.id, record.dataset, reason))
            example = example._replace(target_weights=np.zeros_like(example.target_weights))
            clip = bank = None
        placed = media is not None and len(example.tokens) > 0
        seen, heard = (placed and media.seen), (placed and media.heard)
        return Part(example, seen, heard, clip, bank), record.id, record.dataset
