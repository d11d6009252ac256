"""Where a run's metrics, curves and traces lie while it goes on."""

import shutil
import tempfile
from pathlib import Path

from etils import epath

from vllama2_jax.data.files import is_remote
from vllama2_jax.train.metrics import FILE_NAME

FAULTS = "faults.jsonl"


class Journal:
    """The run's folder itself, or, for one of a bucket, a local copy that is published.

    A bucket's files cannot be appended to. What is lost with a process are the steps since the last
    checkpoint, and the run goes on from that.

    Attributes:
      folder: local; written to at any time.
    """

    def __init__(self, out: epath.Path, process: int = 0):
        """Fetch what the run has written so far, if it lies in a bucket.

        Args:
          out: the run's folder.
          process: whose journal it is; that of another than the first is seen by nobody, but for
            the records that it could not read, `faults.PROCESS.jsonl`.
        """
        self._out, self._process = out, process
        self._apart = is_remote(out) or process > 0
        self.folder = Path(tempfile.mkdtemp(prefix="vllama2-")) if self._apart else Path(out)
        for name in (FILE_NAME, FAULTS) if self._apart and not process else ():
            if (out / name).exists():
                (self.folder / name).write_bytes((out / name).read_bytes())

    def publish(self) -> None:
        """Copy everything to the bucket; local folders are where they should be."""
        if not self._apart:
            return
        if self._process:
            faults = self.folder / FAULTS
            if faults.is_file():
                name = f"faults.{self._process}.jsonl"
                (self._out / name).write_bytes(faults.read_bytes())
            return
        for path in self.folder.rglob("*"):
            if path.is_file():
                target = self._out / path.relative_to(self.folder).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())

    def close(self) -> None:
        """Publish for the last time."""
        self.publish()
        if self._apart:
            shutil.rmtree(self.folder, ignore_errors=True)
