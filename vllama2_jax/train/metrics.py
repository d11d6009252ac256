"""What a run measures, step by step: RUN/metrics.jsonl, and the same for TensorBoard.

A resumed run goes on from the step that its checkpoint holds:

    with MetricsLog(folder, restored_step=0) as log:
        log.write({"step": 1, "loss": 2.5, "seconds": 0.8})
"""

import json
import math
import os
import time
from pathlib import Path

from vllama2_jax.data.files import is_remote

FILE_NAME, EVENTS = "metrics.jsonl", "tensorboard"


class MetricsLog:
    """One JSON object per step in `FOLDER/metrics.jsonl`, its numbers in `FOLDER/tensorboard`.

    When `write` returns, the operating system holds the record, in both places: a process that is
    killed loses none. A log that is opened forgets what comes after the step that the run goes on
    from: those lines are cut off, and TensorBoard is told to drop those events. Write the metrics
    of a step before its checkpoint, or a resumed run may lack them.

    Of several hosts, one keeps the log.
    """

    def __init__(self, folder: str | os.PathLike, *, restored_step: int, tensorboard: bool = True):
        """Open the log of a run, or make a new one.

        Args:
          folder: of the run, made if it is not there.
          restored_step: the last step whose metrics stay; 0 begins anew (metrics of step 0, before
            any training, stay).
          tensorboard: also write event files.

        Raises:
          ValueError: for a folder of a bucket, or a `metrics.jsonl` that holds something else.
        """
        if is_remote(os.fspath(folder)):
            raise ValueError(
                f"{os.fspath(folder)}: metrics are appended to, which a bucket's files cannot be; "
                "choose a local folder and copy it"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE_NAME
        self._last = _cut_back(path, restored_step) if path.exists() else -1
        self._file = path.open("ab")
        self._events = _EventFile(folder / EVENTS, restored_step) if tensorboard else None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()
        if self._events:
            self._events.close()

    def write(self, record: dict) -> None:
        """Append one step.

        Args:
          record: "step", greater than that of the record before, and names with numbers (or arrays
            of one), strings or None. NaN and infinity, which JSON does not have, become null: a
            step that failed, or a mean over nothing, leaves its line and its other values.
            TensorBoard gets them as they are.

        Raises:
          ValueError: for a step that is not a greater whole number, or a value of another kind.
        """
        record = {name: _plain(name, value) for name, value in record.items()}
        step = record.get("step")
        if not _is_step(step):
            raise ValueError(f"metrics need a 'step' that is a whole number, not {step!r}")
        if step <= self._last:
            raise ValueError(
                f"metrics of step {step} cannot follow those of step {self._last}; "
                "write one record per step, in order"
            )
        standard = {name: _finite_or_none(value) for name, value in record.items()}
        self._file.write(json.dumps(standard, allow_nan=False).encode() + b"\n")
        self._file.flush()
        self._last = step
        if self._events:
            self._events.write(step, record)


def read_metrics(folder: str | os.PathLike) -> list[dict]:
    """The records of a run, oldest first; a value that was not finite is None.

    A last line that was torn when its process was killed is left out.

    Raises:
      ValueError: if there is no `metrics.jsonl`, or a line in its middle cannot be read.
    """
    path = Path(folder) / FILE_NAME
    if not path.is_file():
        raise ValueError(f"{path}: no such file; metrics are written while a run trains")
    return [record for _, record in _read(path, math.inf)]


def _plain(name: str, value):
    """A Python number, string or None."""
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:  # of NumPy or JAX
        value = value.item()
    if value is None or isinstance(value, int | float | str):
        return value
    raise ValueError(f"metric {name!r} must be a number or a string, not {type(value).__name__}")


def _finite_or_none(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_step(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _parse(line: bytes) -> dict | None:
    """The record of a line, or None for anything else."""

    def refuse(constant):
        raise ValueError(f"{constant} is not JSON")

    try:
        record = json.loads(line, parse_constant=refuse)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and _is_step(record.get("step")) else None


def _read(path: Path, last_step: float) -> list[tuple[bytes, dict]]:
    """(line without its end, record) of every step up to `last_step`.

    Lines that are no records are dropped only where nothing that is wanted comes after them: a
    killed process or machine leaves such an end. A file that begins with them is not ours.

    Raises:
      ValueError: naming the first such line elsewhere.
    """
    lines = path.read_bytes().split(b"\n")
    if not lines[-1]:
        lines.pop()
    kept, broken = [], None
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is None:
            broken = broken or number
        elif record["step"] <= last_step:
            if broken:
                break
            kept.append((line, record))
    else:
        if broken != 1 or len(lines) == 1:
            return kept
    raise ValueError(
        f"{path}: line {broken} is not the metrics of a step; mend or remove it, or move the file"
    )


def _cut_back(path: Path, last_step: int) -> int:
    """Drop the records behind `last_step` and a torn end; the last step that stays, or -1.

    The new file takes the old one's place in one move, so that earlier lines are never at risk.
    """
    kept = _read(path, last_step)
    text = b"".join(line + b"\n" for line, _ in kept)
    if text != path.read_bytes():
        new = path.with_name(f"{path.name}.new")
        with new.open("wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    return kept[-1][1]["step"] if kept else -1


class _EventFile:
    """TensorBoard's scalars, one event per step.

    tensorboardX's `SummaryWriter` hands events to a thread that writes them some time later, when a
    killed process no longer can; its file writer alone does not.
    """

    def __init__(self, folder: Path, restored_step: int):
        # The import takes a second, and reading metrics does without.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder.mkdir(parents=True, exist_ok=True)
        # Names count whole seconds; a file of the same second and step holds nothing that stays.
        self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{restored_step}")
        # TensorBoard drops what other files hold from this step on (tensorboardX's `purge_step`).
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._append(step=restored_step + 1, session_log=start)

    def write(self, step: int, record: dict) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float)
        ]
        self._append(step=step, summary=self._summary(value=values))

    def _append(self, **event) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), **event))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
