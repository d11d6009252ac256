"""One host's share of a step: its records read, said, decoded and put into arrays.

Grain's workers run this, so it imports no JAX.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from vllama2_jax.data.collate import NOTHING, pack_clips, pack_rows
from vllama2_jax.data.examples import RecordFormat
from vllama2_jax.data.files import local_media
from vllama2_jax.data.records import Media, RecordError
from vllama2_jax.data.schedule import Step
from vllama2_jax.media import (
    REFERENCE,
    Clip,
    ImageSpec,
    Limits,
    MediaError,
    MediaPreset,
    load_clip,
)
from vllama2_jax.text import Supervised


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
    """Reads the media of records from files.

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
        with local_media(source, number, media, self.root) as place:
            clip = load_clip(
                place,
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
      max_clips: clip slots of a row; 0 is text alone, without media arrays.
      host, hosts: which rows of a step are made here: an equal share, in order.
      dataset_codes: of each source int [records], the datasets of its records by number, as
        `index.joint_datasets` gives them; with it the arrays hold "dataset_ids", int32 [B, L].
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

    def __call__(self, step: Step) -> HostBatch:
        """The batch.

        Raises:
          ValueError: if records do not fit their row, since the length index is stale.
        """
        share = len(step.rows) // self.hosts
        own = step.rows[self.host * share : (self.host + 1) * share]
        faults: list[Fault] = []
        rows, clips, records, datasets = [], [], [], []
        for row in own:
            parts = [self._part(*place, faults) for place in row]
            rows.append([part[0] for part in parts])
            clips.append([part[1] for part in parts if (part[0].media_index >= 0).any()])
            records.append(tuple(part[2] for part in parts))
            datasets.append(tuple(part[3] for part in parts))
            slots = sum(len(example.tokens) for example in rows[-1])
            if slots > step.length:
                raise ValueError(
                    f"the records {', '.join(records[-1])} take {slots} slots, more than the "
                    f"{step.length} that the length index planned; build the index anew"
                )
        arrays = pack_rows(rows, step.length, self.record_format.media_tokens)
        if self.dataset_codes is not None:
            arrays["dataset_ids"] = self._dataset_ids(own, arrays["segment_ids"])
        if self.max_clips:
            arrays |= pack_clips(clips, self.max_clips, self.num_frames, self.image_size)
        else:
            arrays |= {"frames": None, "clip_frames": None, "clip_mask": None}
        return HostBatch(step.number, arrays, tuple(records), tuple(datasets), tuple(faults))

    def _dataset_ids(self, rows, segment_ids: np.ndarray) -> np.ndarray:
        """The code of each slot's dataset, int32 [B, L]; 0 at padding."""
        out = np.zeros_like(segment_ids)
        for i, row in enumerate(rows):
            codes = [self.dataset_codes[source][number] for source, number in row]
            out[i] = np.asarray([0, *codes], np.int32)[segment_ids[i]]
        return out

    def _part(
        self, source: int, number: int, faults: list[Fault]
    ) -> tuple[Supervised, Clip | None, str, str]:
        """A record's example, clip, id and dataset; a fault is added where one is met."""
        example, clip = NOTHING, None
        try:
            record = self.sources[source][number]
        except RecordError as error:  # another error is one of the source: nothing in it is sure
            name = error.id or f"record {number} of source {source}"
            faults.append(Fault(source, number, name, "", str(error)))
            return example, clip, name, ""
        try:
            example = self.record_format.supervised(record)
            if record.media is not None:
                clip = self.readers[source](self.sources[source], number, record.media)
        except ValueError as error:
            reason = " ".join(str(error).split())
            faults.append(Fault(source, number, record.id, record.dataset, reason))
            example = example._replace(target_weights=np.zeros_like(example.target_weights))
        return example, clip, record.id, record.dataset
