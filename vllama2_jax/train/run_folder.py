"""A training run's folder.

RUN/train_config.json   the configuration, by which the run knows itself when it is started again
RUN/run.json, card/, checkpoints/   see `checkpoints/run.py`
RUN/metrics.jsonl, tensorboard/     see `metrics.py`
RUN/curves.png       see `curves.py`
RUN/faults.jsonl     records that could not be read, and why
RUN/lock             held by the process that trains
RUN/index/           lengths of records, so that a second start need not count them again
RUN/profile/         a trace for XProf, where one was asked for
"""

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from etils import epath

from vllama2_jax.checkpoints import CheckpointError, ModelCard
from vllama2_jax.checkpoints.card import write_card
from vllama2_jax.checkpoints.run import (
    CARD,
    RUN,
    RunCard,
    check_frozen,
    is_run,
    read_run_card,
    run_card_folder,
    write_run_card,
)
from vllama2_jax.checkpoints.store import TOKENIZER, copy_files
from vllama2_jax.data.files import is_remote
from vllama2_jax.train.config import StartConfig, TrainConfig, differences, to_json
from vllama2_jax.train.journal import FAULTS

CONFIG, INDEX, PROFILE = "train_config.json", "index", "profile"
LOCK = "lock"
# What a start leaves that ends before its run begins, say at a wrong path; it may be used again.
_BEFORE = {LOCK, CONFIG, f"{CONFIG}.unfinished", INDEX, CARD, f"{RUN}.unfinished"}


def claim(out: epath.Path, config: TrainConfig) -> None:
    """Take a new folder, or make sure that it is this run's.

    Raises:
      CheckpointError: for a folder that holds something else; of another configuration, listing
        every difference.
    """
    path, new = out / CONFIG, to_json(config)
    if is_run(out):
        try:
            old = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); restore it") from None
        found = differences(old, new)
        if found:
            raise CheckpointError(
                f"{out}: holds a run of another configuration: {'; '.join(found)}; choose another "
                "--out, or start it as it was"
            )
    out.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{CONFIG}.unfinished")
    unfinished.write_text(json.dumps(new, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


@contextlib.contextmanager
def locked(out: epath.Path):
    """Keep other processes from training into the same folder, as far as it is local.

    Raises:
      CheckpointError: if one does already.
    """
    _refuse_strange(out)
    if is_remote(out):
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{out}: another process trains this run; wait for it, or choose another --out"
            ) from None
        except OSError:
            pass  # a file system without locks, as some networks have: nothing can be held
        yield


def _refuse_strange(out: epath.Path) -> None:
    """Nothing is written into a folder that holds something else."""
    if is_run(out) or not out.exists():
        return
    if not out.is_dir() or not {path.name for path in out.iterdir()} <= _BEFORE:
        raise CheckpointError(f"{out}: exists and is not a run; choose another --out or remove it")


def introduce(
    out: epath.Path,
    config: TrainConfig,
    card: ModelCard,
    files: Sequence[Path],
    frozen: dict[str, str],
    data: dict[str, str],
) -> None:
    """Write what the run begins with, or hold it against what it began with.

    Args:
      out: the run's folder.
      config: of the run.
      card: of the model that is trained.
      files: of its tokenizer.
      frozen: fingerprints of parameters, `start.Prepared.reference`.
      data: fingerprints of records, `feeding.Feeding.fingerprints`.

    Raises:
      CheckpointError: if frozen parameters or records have changed.
    """
    introduced = RunCard(
        start=dataclasses.asdict(_anywhere(config.start)),
        rules=[dataclasses.asdict(rule) for rule in config.rules],
        seed=config.seed,
        dtype=config.dtype,
        frozen=frozen,
        data=data,
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


def _anywhere(start: StartConfig) -> StartConfig:
    """With whole names of folders and files, so that the run can be asked from elsewhere."""
    kinds = dict.fromkeys(("model", "vision", "decoder"), os.path.isdir)
    kinds["audio"] = os.path.isfile
    whole = {
        field: os.path.abspath(name)
        for field, name in dataclasses.asdict(start).items()
        if field in kinds and kinds[field](name)
    }
    return dataclasses.replace(start, **whole)


def write_faults(folder: Path, faults: Iterable[dict]) -> None:
    """Add records that could not be read to `faults.jsonl`, each once; none make no file.

    Args:
      folder: local, of the run.
      faults: of this process; those that are in the file stay.
    """
    path = folder / FAULTS
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    lines += [json.dumps(fault, ensure_ascii=False) for fault in faults]
    if lines:
        unfinished = path.with_name(f"{FAULTS}.unfinished")
        unfinished.write_text("\n".join(dict.fromkeys(lines)) + "\n", encoding="utf-8")
        unfinished.replace(path)
