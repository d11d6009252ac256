"""A training run's folder: what it began with, and its checkpoints.

RUN/run.json        what the run began with, and a strict reference to what it does not train
RUN/card/           model card and tokenizer, as in a saved model
RUN/checkpoints/N/  after N steps: `trainable` and `optimizer`, each an Orbax item
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from vllama2_jax.checkpoints.card import CheckpointError
from vllama2_jax.checkpoints.store import check_tree, place, quiet_orbax

FORMAT, VERSION = "vllama2_jax run", 1
RUN, CARD, CHECKPOINTS = "run.json", "card", "checkpoints"
_TRAINABLE, _OPTIMIZER, _SCORE = "trainable", "optimizer", "score"


@dataclasses.dataclass(frozen=True)
class RunCard:
    """What a run began with, as plain JSON.

    Attributes:
      start: a `train.config.StartConfig`, by which the parameters are made again.
      rules: of what trains, `train.trainable.Rule`s.
      seed: of new parameters.
      dtype: of the frozen parameters.
      frozen: {path: fingerprint} of the parameters that no checkpoint holds.
      data: {source's name: fingerprint} of the records that are read.
    """

    start: dict
    rules: list[dict]
    seed: int
    dtype: str
    frozen: dict[str, str]
    data: dict[str, str]


def is_run(folder: Path) -> bool:
    """Whether a directory looks like a training run's."""
    return (folder / RUN).is_file()


def run_card_folder(folder: Path) -> Path:
    """Where a run keeps its model card and tokenizer."""
    return folder / CARD


def write_run_card(folder: Path, card: RunCard) -> None:
    """Write `folder/run.json`, whole or not at all."""
    data = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(card)}
    unfinished = folder / f"{RUN}.unfinished"
    unfinished.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(folder / RUN)


def read_run_card(folder: Path) -> RunCard:
    """Read `folder/run.json`.

    Raises:
      CheckpointError: if it is damaged, or of another format or version.
    """
    path = folder / RUN
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if (data.pop("format"), data.pop("version")) != (FORMAT, VERSION):
            raise ValueError(f"not a run of {FORMAT} {VERSION}")
        return RunCard(**data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: cannot be read ({reason}); restore it from a copy, or begin a new run"
        ) from None


def fingerprints(params: dict[str, jax.Array]) -> dict[str, str]:
    """{path: dtype, shape and a 64-bit checksum of the bits} of a flat dict of arrays.

    The checksum runs where the array is, in integers, so that it is the same on every platform and
    sharding: two sums, modulo 2^32, of the bits of each number times odd weights of its place.
    """
    return {
        path: f"{leaf.dtype} {list(leaf.shape)} {first:08x}{second:08x}"
        for path, leaf in params.items()
        for first, second in [_checksum(jnp.asarray(leaf)).tolist()]
    }


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    # Places are counted axis by axis: flattened, an array that is split would have to be gathered.
    place, step = jnp.zeros((), jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        own = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place += own * jnp.uint32(step % (1 << 32))
        step *= x.shape[axis]
    sums = [
        jnp.sum((bits + jnp.uint32(1)) * (place * jnp.uint32(weight) | jnp.uint32(1)))
        for weight in (0x9E3779B1, 0x85EBCA77)
    ]
    return jnp.stack(sums)


def check_frozen(where: Path, wanted: dict[str, str], found: dict[str, str]) -> None:
    """Refuse to join a run's checkpoints to other parameters than those that it froze.

    Raises:
      CheckpointError: naming parameters that differ.
    """
    differing = sorted(p for p in wanted | found if wanted.get(p) != found.get(p))
    if differing:
        named = ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")
        raise CheckpointError(
            f"{where}: the model that this run began with has changed since, in "
            f"{len(differing)} of {len(wanted)} frozen parameters ({named}); put back the model "
            f"that {RUN} names under `start`"
        )


class RunCheckpoints:
    """Checkpoints of a run, written while it goes on, each whole or not there.

    What is frozen is never written. `saved` steps are those that can be restored.
    """

    def __init__(
        self, folder: Path, *, keep_last: int = 1, keep_best: int = 0, read_only: bool = False
    ):
        """Open or create `folder/checkpoints`; what an interrupted save left there is removed.

        Args:
          folder: the run's.
          keep_last: how many of the newest are kept.
          keep_best: how many of those with the lowest score are kept beside them.
          read_only: touch nothing, since the run may still be going on.
        """
        self.folder = place(folder) / CHECKPOINTS
        policies = [preservation_policy.LatestN(keep_last)]
        if keep_best:
            policies.append(
                preservation_policy.BestN(
                    get_metric_fn=lambda metrics: metrics[_SCORE],
                    reverse=True,  # the last ones of the order are kept
                    n=keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        handlers = {
            _TRAINABLE: ocp.StandardCheckpointHandler(),
            _OPTIMIZER: ocp.StandardCheckpointHandler(),
        }
        with quiet_orbax():  # its warnings about being read only are what was asked for
            options = ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
                save_decision_policy=_always,
            )
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_handlers=handlers
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        # Waits for a save that is under way, and removes what the policy no longer keeps.
        self._manager.close()

    @property
    def steps(self) -> list[int]:
        """Steps that can be restored, in order."""
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        """The newest step that can be restored."""
        return self._manager.latest_step()

    def save(self, step: int, trainable: dict, optimizer, score: float | None) -> None:
        """Begin to save; the arrays are copied before this returns, so a step may consume them.

        Args:
          step: steps taken.
          trainable: {path: array}.
          optimizer: its state.
          score: what the best are chosen by, lower is better; None is never among them.

        Raises:
          CheckpointError: if this save, or the one before, has failed.
        """
        self._guarded(
            lambda: self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{
                        _TRAINABLE: ocp.args.StandardSave(trainable),
                        _OPTIMIZER: ocp.args.StandardSave(optimizer),
                    }
                ),
                metrics=None if score is None else {_SCORE: float(score)},
            )
        )

    def check(self) -> None:
        """Ask, without waiting, whether the save that is under way has failed.

        Raises:
          CheckpointError: if so.
        """
        self._guarded(self._manager.check_for_errors)

    def wait(self) -> None:
        """Wait until everything is written.

        Raises:
          CheckpointError: if it could not be.
        """
        self._guarded(self._manager.wait_until_finished)

    def _guarded(self, act):
        try:
            act()
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise CheckpointError(
                f"{self.folder}: a checkpoint could not be written ({reason}); make room or mend "
                "the folder's permissions, then start the same command again"
            ) from error

    def restore(self, step: int, trainable: dict, optimizer):
        """(trainable, optimizer state) of a step.

        Args:
          step: one of `steps`.
          trainable, optimizer: arrays, or shapes and dtypes, of what is expected; where they have
            shardings, the arrays go there, however many devices wrote them.

        Raises:
          CheckpointError: if something else lies there, or it cannot be read.
        """
        found = self.restore_trainable(step, trainable)
        where = str(self.folder / str(step))
        return found, self._read(step, _OPTIMIZER, optimizer, where)

    def restore_trainable(self, step: int, trainable: dict) -> dict:
        """What was trained, without the optimizer's state; see `restore`."""
        where = str(self.folder / str(step))
        check_tree(self.stored(step), trainable, where)
        return self._read(step, _TRAINABLE, trainable, where)

    def stored(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Paths, shapes and dtypes of what was trained, without reading it."""
        found = self._manager.item_metadata(step)[_TRAINABLE]
        if found is None:
            where = self.folder / str(step)
            raise CheckpointError(f"{where}: is not complete; remove it to go on from an older one")
        return {
            path: jax.ShapeDtypeStruct(tuple(leaf.shape), np.dtype(leaf.dtype))
            for path, leaf in found.tree.items()
        }

    def _read(self, step: int, item: str, expected, where: str):
        # A place for every array: else Orbax wants the devices that it was saved from.
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or here
            ),
            expected,
        )
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(**{item: ocp.args.StandardRestore(target)})
            )
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise CheckpointError(
                f"{where}: cannot be read ({reason}); remove it to go on from an older one"
            ) from error
        return restored[item]


class _Always:
    """When to save is the loop's decision."""

    def should_save(self, step, previous_steps, *, context) -> bool:
        return True


_always = _Always()
