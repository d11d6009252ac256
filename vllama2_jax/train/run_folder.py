"""A training run's folder.

RUN/train_config.json   the configuration, by which the run knows itself when it is started again
RUN/run.json, card/, checkpoints/   see `checkpoints/run.py`
RUN/metrics.jsonl, tensorboard/     see `metrics.py`
RUN/curves.png       see `curves.py`
RUN/faults.jsonl     records that could not be read, and why
RUN/index/           lengths of records, so that a second start need not count them again
RUN/profile/         a trace for XProf, where one was asked for
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from etils import epath

from vllama2_jax.checkpoints import CheckpointError, ModelCard
from vllama2_jax.checkpoints.card import write_card
from vllama2_jax.checkpoints.run import (
    RunCard,
    check_frozen,
    fingerprints,
    is_run,
    read_run_card,
    run_card_folder,
    write_run_card,
)
from vllama2_jax.checkpoints.store import TOKENIZER, copy_files
from vllama2_jax.train.config import TrainConfig, differences, to_json
from vllama2_jax.train.feeding import Feeding

CONFIG, INDEX, FAULTS, PROFILE = "train_config.json", "index", "faults.jsonl", "profile"


def claim(out: epath.Path, config: TrainConfig) -> None:
    """Take a new folder, or make sure that it is this run's.

    Raises:
      CheckpointError: for a folder that holds something else; of another configuration, listing
        every difference.
    """
    path, new = out / CONFIG, to_json(config)
    if path.is_file():
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); restore it") from None
        found = differences(old, new)
        if found:
            raise CheckpointError(
                f"{out}: holds a run of another configuration: {'; '.join(found)}; choose another "
                "--out, or start it as it was"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: exists and is not a run; choose another --out or remove it")
    out.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{CONFIG}.unfinished")
    unfinished.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def introduce(
    out: epath.Path,
    config: TrainConfig,
    card: ModelCard,
    files: Sequence[Path],
    frozen: dict,
    feeding: Feeding,
) -> None:
    """Write what the run begins with, or hold it against what it began with.

    Raises:
      CheckpointError: if frozen parameters or records have changed.
    """
    introduced = RunCard(
        start=dataclasses.asdict(config.start),
        rules=[dataclasses.asdict(rule) for rule in config.rules],
        seed=config.seed,
        dtype=config.dtype,
        frozen=fingerprints(frozen),
        data=feeding.fingerprints,
    )
    if is_run(out):
        before = read_run_card(out)
        check_frozen(out, before.frozen, introduced.frozen)
        changed = sorted(k for k, v in introduced.data.items() if before.data.get(k) != v)
        if changed:
            raise CheckpointError(
                f"{out}: the records of {', '.join(changed)} have changed since the run began, so "
                "it cannot go on where it was; put them back, or begin another run with --out"
            )
        return
    folder = run_card_folder(out)
    if folder.exists():  # of a start that was cut short
        folder.rmtree()
    copy_files(files, folder / TOKENIZER)
    write_card(folder, card)
    write_run_card(out, introduced)


def write_faults(out: epath.Path, feeding: Feeding) -> None:
    """Write `faults.jsonl`: the records that this process could not read."""
    faults = sorted(feeding.feed.faults.values())
    lines = [json.dumps(fault._asdict(), ensure_ascii=False) + "\n" for fault in faults]
    if lines:
        (out / FAULTS).write_text("".join(lines), encoding="utf-8")
