"""A small mixture of pictures, a video and text, and the feeds that read it."""

import dataclasses
import json

from vllama2_jax.data.assemble import Assembler, ClipReader
from vllama2_jax.data.examples import RecordFormat
from vllama2_jax.data.index import build_index, joint_datasets
from vllama2_jax.data.mixture import Mixture
from vllama2_jax.data.pipeline import Feed
from vllama2_jax.data.schedule import Schedule
from vllama2_jax.data.sources import open_source
from vllama2_jax.media import REFERENCE, ImageSpec

SPEC = ImageSpec(16, "stretch", (0.5,) * 3, (0.5,) * 3)
MEDIA_TOKENS, NUM_FRAMES, ROWS, MAX_LENGTH = 6, 4, 4, 160
BUCKETS = (64, 96, MAX_LENGTH)
QUESTION = "What colour is the shape?"


def record(name, kind=None, source=None, answer="Red.", turns=1, dataset="toys"):
    tag = f"<{kind}>\n" if kind else ""
    conversation = []
    for turn in range(turns):
        conversation.append({"from": "human", "value": (tag if turn == 0 else "") + QUESTION})
        conversation.append({"from": "gpt", "value": answer})
    record = {"id": name, "dataset": dataset, "conversations": conversation}
    return record | ({kind: source} if kind else {})


def write(path, records):
    path.write_text(json.dumps(records))
    return open_source(path)


@dataclasses.dataclass(frozen=True)
class Setting:
    """All that a feed needs, with the parts that tests vary."""

    tokenizer: object
    folder: object
    sources: tuple
    media_tokens: int = MEDIA_TOKENS

    def format(self, **changes):
        values = dict(
            template="chatml",
            style="sft",
            media_tokens=self.media_tokens,
            max_tokens=120,
            max_length=MAX_LENGTH,
        )
        return RecordFormat(self.tokenizer, **{**values, **changes})

    def indices(self):
        return [build_index(source, self.format()) for source in self.sources]

    def schedule(
        self, packing=True, epochs=2, max_clips=2, lengths=None, counts=None, buckets=BUCKETS
    ):
        form, indices = self.format(), self.indices()
        if lengths is None:
            lengths = [form.slots(index.text_tokens, index.clips) for index in indices]
        sizes = tuple(map(len, self.sources))
        return Schedule(
            Mixture.by_counts(sizes, counts or sizes, seed=4),
            lengths,
            [index.clips for index in indices],
            rows=ROWS,
            max_length=MAX_LENGTH,
            max_clips=max_clips,
            packing=packing,
            buckets=buckets,
            epochs=epochs,
            window=16,
        )

    def assembler(self, host=0, hosts=1, max_clips=2):
        reader = ClipReader(SPEC, NUM_FRAMES, REFERENCE, str(self.folder))
        return Assembler(
            self.sources,
            self.format(),
            (reader,) * len(self.sources),
            NUM_FRAMES,
            SPEC.size,
            max_clips,
            host,
            hosts,
            dataset_codes=joint_datasets(self.indices())[1],
        )

    def feed(self, packing=True, host=0, hosts=1, epochs=2, **options):
        return Feed(self.schedule(packing, epochs=epochs), self.assembler(host, hosts), **options)


def segments(batches):
    """(record id, arrays of the segment, row's arrays) of each record of the batches."""
    names = ("tokens", "targets", "target_weights", "positions", "media_index")
    for batch in batches:
        for i, ids in enumerate(batch.records):
            row = {name: array[i] for name, array in batch.arrays.items()}
            for segment, id in enumerate(ids, start=1):
                inside = row["segment_ids"] == segment
                yield id, {name: row[name][inside] for name in names}, row
