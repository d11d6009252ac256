"""A run's folder may lie in a bucket; here one in memory stands for it.

Arrays go through TensorStore's own client, which needs a real bucket: they are not tried here.
"""

import dataclasses
import json
import sys
from pathlib import Path

import fsspec  # noqa: F401  its registry is patched
import pytest
from etils import epath
from etils.epath.backend import fsspec_backend
from fsspec.implementations.memory import MemoryFileSystem

from vllama2_jax.checkpoints import CheckpointError
from vllama2_jax.checkpoints.run import is_run, read_run_card, run_card_folder
from vllama2_jax.checkpoints.store import place
from vllama2_jax.cli import main
from vllama2_jax.train.journal import Journal
from vllama2_jax.train.metrics import MetricsLog, read_metrics
from vllama2_jax.train.run_folder import CONFIG, claim, introduce
from vllama2_jax.weights import TINY, describe


class Bucket(MemoryFileSystem):
    """Files in memory under gs:// names."""

    protocol = ("gs", "gcs")
    store: dict = {}  # noqa: RUF012  as in the class that it extends
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://").removeprefix("gcs://"))


@pytest.fixture
def bucket(monkeypatch):
    for name in ("gs", "gcs"):
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, name, Bucket)
    Bucket.store.clear()
    forget = fsspec_backend._get_filesystem.cache_clear
    forget()
    yield epath.Path("gs://bucket/run")
    forget()


def test_a_run_introduces_itself_in_a_bucket(bucket, small_run):
    card, tokenizer = describe("tiny")
    files = sorted(tokenizer.iterdir())
    claim(bucket, small_run)
    claim(bucket, small_run)
    introduce(bucket, small_run, card, files, {}, {"toybox": "abc"})
    assert is_run(bucket) and read_run_card(bucket).data == {"toybox": "abc"}
    assert json.loads((bucket / CONFIG).read_text())["rows"] == 4
    claim(bucket, small_run)
    with pytest.raises(CheckpointError, match="rows: 4 -> 5"):
        claim(bucket, dataclasses.replace(small_run, rows=5))
    found, folder = describe(str(bucket))
    assert found == card
    assert [path.name for path in sorted(folder.iterdir())] == [path.name for path in files]
    assert run_card_folder(bucket).is_dir() and TINY.is_dir()


@pytest.mark.parametrize("command", ["train", "convert"])
def test_the_command_line_keeps_a_buckets_name(command, monkeypatch, bucket):
    given = []
    monkeypatch.setattr("vllama2_jax.train.run.run", lambda config, out, *_: given.append(out))
    monkeypatch.setattr(
        "vllama2_jax.checkpoints.save_model", lambda folder, *rest: given.append(str(folder))
    )
    options = {"train": ["--out", "gs://b/run"], "convert": ["tiny", "gs://b/run"]}
    main([command, *options[command]])
    assert given == ["gs://b/run"]
    with pytest.raises(ValueError, match="begins with two slashes"):
        place(Path("gs://b/run"))


def test_metrics_are_published_and_fetched_again(bucket):
    journal = Journal(bucket)
    with MetricsLog(journal.folder, restored_step=0, tensorboard=False) as log:
        log.write({"step": 1, "loss": 2.0})
        assert not (bucket / "metrics.jsonl").exists()
        journal.publish()
        log.write({"step": 2, "loss": 1.0})
    journal.close()
    again = Journal(bucket)
    assert [record["step"] for record in read_metrics(again.folder)] == [1, 2]
    again.close()
    assert not again.folder.exists()


def test_a_local_folder_is_its_own_journal(tmp_path):
    journal = Journal(place(tmp_path))
    journal.close()
    assert journal.folder == tmp_path and tmp_path.is_dir()
