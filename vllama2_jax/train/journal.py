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

    def __init__(self, out: epath.Path):
        """Fetch what the run has written so far, if it lies in a bucket."""
        self._out, self._remote = out, is_remote(out)
        self.folder = Path(tempfile.mkdtemp(prefix="vllama2-")) if self._remote else Path(out)
        for name in (FILE_NAME, FAULTS) if self._remote else ():
            if (out / name).exists():
                (self.folder / name).write_bytes((out / name).read_bytes())

    def publish(self) -> None:
        """Copy everything to the bucket; local folders are where they should be."""
        if not self._remote:
            return
        for path in self.folder.rglob("*"):
            if path.is_file():
                target = self._out / path.relative_to(self.folder).as_posix()
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(path.read_bytes())

    def close(self) -> None:
        """Publish for the last time."""
        self.publish()
        if self._remote:
            shutil.rmtree(self.folder, ignore_errors=True)
