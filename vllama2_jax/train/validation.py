"""Held-out records: their loss, and whether the model's own answers are right."""

import collections
import functools
import os
from collections.abc import Sequence

import jax
import numpy as np

from vllama2_jax.checkpoints import ModelCard
from vllama2_jax.checkpoints.store import flatten, float_dtype
from vllama2_jax.data.assemble import Fault
from vllama2_jax.data.records import Record
from vllama2_jax.infer.media import ReadMedia
from vllama2_jax.infer.model import Model
from vllama2_jax.models.axes import Layout, using
from vllama2_jax.parallel.backends import compiler_options
from vllama2_jax.parallel.sharding import whole
from vllama2_jax.progress import bar
from vllama2_jax.text import Tokenizer
from vllama2_jax.train.config import TrainConfig
from vllama2_jax.train.feeding import make_feeding
from vllama2_jax.train.lora import merge
from vllama2_jax.train.loss import LossSums, batch_loss, dataset_losses
from vllama2_jax.train.run_step import run_network
from vllama2_jax.train.trainable import combine
from vllama2_jax.weights import unstack


class Validation:
    """Looks at a run's held-out records; calling it gives the numbers of a moment."""

    def __init__(
        self,
        config: TrainConfig,
        card: ModelCard,
        tokenizer: Tokenizer,
        index_folder: str | os.PathLike,
        layout: Layout | None = None,
    ):
        """Open the records and plan their batches, of the shapes that a micro-batch has.

        Args:
          config: of the run; its `validation` names at least one source.
          card: of the model that is trained.
          tokenizer: of the model.
          index_folder: see `make_feeding`.
          layout: how the run is laid out over devices.
        """
        self._config, self._card, self._tokenizer = config, card, tokenizer
        self._dtype = float_dtype(config.dtype)
        self._feeding = make_feeding(
            config.data,
            card,
            tokenizer,
            rows=config.rows // config.micro_batches,  # what fits at once
            seed=0,
            index_folder=index_folder,
            held_out=config.validation,
            layout=layout,
        )
        loss = functools.partial(
            batch_loss,
            run_network(config, card.config, layout),
            config=config.loss,
            datasets=self._feeding.datasets,
        )
        #: {source's name: sha256} of the records that are read.
        self.fingerprints = self._feeding.fingerprints
        self._layout = layout
        self._sums = jax.jit(
            lambda trainable, frozen, batch: self._evaluate(loss, trainable, frozen, batch),
            out_shardings=whole(layout) if layout else None,
            compiler_options=compiler_options(layout.mesh.devices) or None if layout else None,
        )
        self._model: Model | None = None

    @property
    def faults(self) -> list[Fault]:
        """Held-out records that could not be read."""
        return list(self._feeding.feed.faults.values())

    def _evaluate(self, loss, trainable: dict, frozen: dict, batch) -> LossSums:
        narrow = {path: leaf.astype(self._dtype) for path, leaf in trainable.items()}
        with using(self._layout):
            return loss(combine(narrow, frozen), batch)

    def __call__(self, trainable: dict, frozen: dict) -> dict[str, float]:
        """`validation/loss`, `validation/loss/<dataset>`, and `accuracy/<kind>` where asked for.

        Args:
          trainable, frozen: the parameters, as in `make_step`.

        Raises:
          TooManyFaults: if more of the records cannot be read than the run allows.
          ValueError: if nothing of them can be learnt from, so that there is no loss.
        """
        totals: dict[str, float] = collections.defaultdict(float)
        steps = len(self._feeding.schedule)
        with bar("validating", unit="steps") as progress:
            for number, batch in enumerate(self._feeding.batches(0), start=1):
                sums = jax.device_get(self._sums(trainable, frozen, batch))
                named = {"total": sums.total, "weight": sums.weight, **sums.counts}
                for name, value in named.items():
                    totals[name] += float(value)
                progress(number, steps)
        means = dataset_losses(totals)
        if not means["weight"]:
            reasons = "; ".join(fault.reason for fault in self.faults[:3])
            raise ValueError(f"no held-out record has anything to predict ({reasons})")
        found = {"validation/loss": means["total"] / means["weight"]}
        found |= {f"validation/{n}": v for n, v in means.items() if n.startswith("loss/")}
        if self._config.validation.accuracy:
            found |= self._accuracy(combine(trainable, frozen))
        return found

    def _accuracy(self, params) -> dict[str, float]:
        """Share of first questions that are answered exactly as the record does, per kind."""
        params = merge(params, self._dtype)
        flat = flatten(jax.tree.map(lambda leaf: leaf.astype(self._dtype), params))
        del params
        params = unstack(flat, split_experts=False)
        if self._model is None:
            self._model = Model(
                params, self._card, self._tokenizer, self._dtype, layout=self._layout
            )
        self._model.generator.params = params  # the programs are compiled once
        with bar("asking", unit="answers") as progress:
            records, pairs = self._questions()
            answers = self._model.ask_batch(
                pairs, max_new_tokens=self._longest_answer(records), progress=progress
            )
        self._model.generator.params = None
        hits = collections.defaultdict(list)
        for record, answer in zip(records, answers, strict=True):
            hits[record.kind or "questions"].append(answer == record.turns[0][1].strip())
        return {f"accuracy/{kind}": float(np.mean(found)) for kind, found in hits.items()}

    def _questions(self) -> tuple[list[Record], list[tuple]]:
        """The records that can be read, and of each its media and first question."""
        assembler = self._feeding.feed.assembler
        records, pairs = [], []
        for place, source in enumerate(assembler.sources):
            for number in range(len(source)):
                try:
                    record = source[number]
                    media = ReadMedia(*assembler.read_media(place, number, record.media, seed=0))
                except ValueError:
                    continue  # it is among the faults, since the loss was there first
                question = record.turns[0][0]
                if record.media is not None:
                    question = question.replace(record.media.placeholder, "", 1)
                records.append(record)
                pairs.append((media, question.strip()))
        return records, pairs

    def _longest_answer(self, records: Sequence[Record]) -> int:
        return 1 + max(len(self._tokenizer.encode(record.turns[0][1])) for record in records)
