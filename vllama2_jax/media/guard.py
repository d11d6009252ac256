"""One long-lived decoder subprocess per process, killed and started anew when a file breaks it."""

import atexit
import contextlib
import dataclasses
import fcntl
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence

import numpy as np

from vllama2_jax.media import wire
from vllama2_jax.media.errors import Limits, MediaError

_START_SECONDS = 60.0  # until the first reply of a fresh worker, on top of the file's own deadline
_END_SECONDS = 5.0  # from the kill to the end of a worker
_CHUNK = 1 << 20


class _Crashed(Exception):
    """The worker ended in the middle of a request."""


class _Late(Exception):
    """The worker missed the deadline."""


class Decoder:
    """A decoder subprocess, started on first use; requests of several threads take turns.

    A worker that crashes or misses a deadline is killed; the next request starts another. After
    `os.fork` the child starts its own.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._worker: subprocess.Popen | None = None
        self._log = None
        self._leaving = False

    @property
    def pid(self) -> int | None:
        """Process id of the running worker, if there is one."""
        return self._worker.pid if self._worker else None

    def ask(
        self, operation: str, paths: Sequence[str], limits: Limits, **details
    ) -> tuple[dict, np.ndarray | None]:
        """Have the worker do one thing.

        Args:
          operation: a name in `decoder.py`.
          paths: the files, as the user gave them; errors name them so.
          limits: bounds; `max_seconds` is kept here, by killing the worker.
          **details: what else the operation needs, of JSON types.

        Returns:
          the result and its array, of `result["shape"]` and `result["dtype"]`, or None.

        Raises:
          MediaError: what the worker found wrong, or that it crashed or took too long.
        """
        sent = [_absolute(path) for path in paths]
        request = {
            "operation": operation,
            "paths": sent,
            "limits": dataclasses.asdict(limits),
            **details,
        }
        # Before the lock: what cannot be sent costs no worker.
        message, seconds = wire.pack(request), float(limits.max_seconds)
        with self._lock:
            try:
                header, body = self._exchange_twice(message, seconds)
            except _Late:
                self._stop()
                raise MediaError(
                    paths[0],
                    f"decoding took longer than {seconds:g} s and was stopped",
                    "convert or cut the file, or raise Limits.max_seconds",
                ) from None
            except _Crashed as crash:
                if self._leaving:
                    raise MediaError(
                        paths[0], "was not read: this process is ending", "read it earlier"
                    ) from None
                raise MediaError(
                    paths[0],
                    f"the decoder crashed on it ({crash})",
                    "convert the file to H.264 .mp4",
                ) from None
            except BaseException:
                self._stop()  # an interrupt: the reply would otherwise meet the next request
                raise
        if "error" in header:
            found, cause, remedy = header["error"]
            error = MediaError(_as_given(found, paths, sent), cause, remedy)
            if "traceback" in header:
                error.add_note(header["traceback"])  # shown with a traceback, not in the message
            raise error
        return header["result"], body

    def close(self):
        """End the worker, if one runs."""
        with self._lock:
            self._stop()

    def close_at_exit(self):
        """End the worker for good, even in the middle of another thread's request."""
        self._leaving = True
        if self._lock.acquire(blocking=False):
            try:
                self._stop()
            finally:
                self._lock.release()
        elif (worker := self._worker) is not None:
            _end(worker)  # that thread lets go of its pipes, if it still comes to it

    def forget(self):
        """After a fork, in the child: let go of the parent's worker without touching it."""
        self._lock, self._leaving = threading.Lock(), False
        worker, self._worker, self._log = self._worker, None, None
        if worker is not None:
            # Our copies of its pipes would keep it alive when the parent is gone.
            worker.stdin.close()
            worker.stdout.close()
            worker.returncode = 0  # not ours to wait for

    def _exchange_twice(self, message: bytes, seconds: float):
        """One request and its reply; a crash of a worker that served before is tried once more.

        Such a worker may have died between requests, or of what an earlier file did to it; a fresh
        one tells.
        """
        if self._worker is not None:
            try:
                return self._exchange(message, time.monotonic() + seconds)
            except _Crashed:
                # Silent, as it says nothing yet about this file; if it is the cause, the fresh
                # worker crashes as well, and that is reported.
                pass
        self._start()
        return self._exchange(message, time.monotonic() + seconds + _START_SECONDS)

    def _exchange(self, message: bytes, deadline: float):
        try:
            self._send(message, deadline)
            lengths = wire.unpack_prefix(self._receive(wire.PREFIX, deadline))
            header = json.loads(bytes(self._receive(lengths[0], deadline)))
            body = None
            if "shape" in header.get("result", ()):
                kind = np.dtype(header["result"]["dtype"])
                body = np.frombuffer(self._receive(lengths[1], deadline), kind)
                body = body.reshape(header["result"]["shape"])
            return header, body
        except (BrokenPipeError, EOFError):
            raise _Crashed(self._last_words()) from None

    def _send(self, message: bytes, deadline: float):
        view, pipe = memoryview(message), self._worker.stdin.fileno()
        poll = select.poll()
        poll.register(pipe, select.POLLOUT)
        while view:
            _wait(poll, deadline)
            # So much never blocks once the pipe is ready, even where nobody reads from it.
            view = view[os.write(pipe, view[: select.PIPE_BUF]) :]

    def _receive(self, count: int, deadline: float) -> bytearray:
        """Exactly so many bytes of the reply."""
        data = bytearray(count)
        view, pipe = memoryview(data), self._worker.stdout.fileno()
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        while view:
            _wait(poll, deadline)
            got = os.readv(pipe, [view[:_CHUNK]])
            if got == 0:
                raise EOFError
            view = view[got:]
        return data

    def _start(self):
        if self._leaving:
            raise _Crashed
        self._log = tempfile.TemporaryFile()
        environment = dict(os.environ)
        # What this process can import, the worker can. It multiplies nothing: one BLAS thread.
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment["OPENBLAS_NUM_THREADS"] = "1"
        self._worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "vllama2_jax.media.decoder", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
            env=environment,
        )
        _widen(self._worker.stdout)

    def _last_words(self) -> str:
        """How the worker ended; it is gone afterwards."""
        try:
            code = self._worker.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        self._log.seek(0)
        lines = self._log.read()[-2000:].decode(errors="replace").strip().splitlines()
        self._stop()
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return f"{how}: {lines[-1]}" if lines else how

    def _stop(self):
        worker, self._worker = self._worker, None
        if worker is None:
            return
        _end(worker)
        worker.stdin.close()
        worker.stdout.close()
        self._log.close()


def _absolute(path: str) -> str:
    """What the worker can open from the folder where it was started.

    Not `os.path.abspath`, which takes "link/.." for the folder that holds the link.
    """
    if not path:
        raise MediaError("''", "the path is empty", "give the path of a file or folder")
    if os.path.isabs(path):
        return path
    try:
        return os.path.join(os.getcwd(), path)
    except OSError as error:
        raise MediaError(
            path,
            f"cannot be found: the current folder is gone ({error.strerror})",
            "give an absolute path",
        ) from None


def _as_given(found: str, given: Sequence[str], sent: Sequence[str]) -> str:
    """The user's own name for a path of the worker: one that was sent, or a file below it."""
    if found in sent:
        return given[sent.index(found)]
    for own, absolute in zip(given, sent, strict=True):
        if found.startswith(absolute):
            return own + found[len(absolute) :]
    return found


def _widen(pipe) -> None:
    """Let a pipe hold a clip's worth: through 64 KiB, both sides wake each other for every part.

    One worker of a training run reads 4 % more clips for it (docs/results/pipeline.md).
    """
    with contextlib.suppress(AttributeError, OSError):  # Linux alone; and it may have a limit
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _CHUNK)


def _wait(poll, deadline: float):
    while (left := deadline - time.monotonic()) > 0:
        if poll.poll(min(left, 3600) * 1000):  # more, or "never", would overflow
            return
    raise _Late


def _end(worker: subprocess.Popen):
    worker.kill()
    try:
        worker.wait(_END_SECONDS)
    except subprocess.TimeoutExpired:
        pass  # it hangs in the kernel, on a dead disk; the kill takes it when it comes out


DECODER = Decoder()
atexit.register(DECODER.close_at_exit)
os.register_at_fork(after_in_child=DECODER.forget)
