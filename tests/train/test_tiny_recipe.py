"""`make tiny` in two steps each: schooling, pre-training, fine-tuning, and a model to ask."""

import dataclasses

import numpy as np
import pytest

import vllama2_jax as vl
from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.configs import build, parse
from vllama2_jax.models.zoo import ZOO
from vllama2_jax.train.metrics import read_metrics
from vllama2_jax.train.run import run
from vllama2_jax.train.schooling import LESSONS, school
from vllama2_jax.weights import read

NARROW = dataclasses.replace(
    ZOO["tiny"],
    vision=dataclasses.replace(ZOO["tiny"].vision, width=24, mlp_dim=48),
    connector=dataclasses.replace(ZOO["tiny"].connector, in_dim=24, out_dim=32),
    decoder=dataclasses.replace(ZOO["tiny"].decoder, width=32, mlp_dim=64, num_layers=1),
)


def _recipe(name, start):
    config = parse([f"config:{name}", "set:rows=2", f"set:start.model={str(start)!r}"])
    for source in (*config.data.sources, *config.validation.sources):
        source.records = 4
    return build(config)


@pytest.mark.slow
def test_every_stage_begins_with_what_the_one_before_it_has_made(tmp_path):
    start, pretrained, tuned = (tmp_path / name for name in ("start", "pretrain", "sft"))
    lessons = [dataclasses.replace(lesson, steps=1, rows=2) for lesson in LESSONS]
    school(NARROW, start, lessons)
    run(_recipe("tiny_video_pretrain", start), pretrained)
    run(_recipe("tiny_video_sft", pretrained), tuned)

    params = [flatten(read(f, None, scan_layers=True)[0]) for f in (start, pretrained, tuned)]
    for before, after, trains in (
        (params[0], params[1], {"connector"}),
        (params[1], params[2], {"connector", "decoder"}),
    ):
        changed = {p.split("/")[0] for p in before if not np.array_equal(before[p], after[p])}
        assert changed == trains
    for folder, datasets in ((pretrained, ["captions"]), (tuned, ["clips", "bare"])):
        records = read_metrics(folder)
        assert len(records) >= 2 and np.isfinite([record["loss"] for record in records]).all()
        assert {f"loss/{name}" for name in datasets} <= set().union(*records)
        assert np.isfinite(records[-1]["validation/loss"])
    assert any(name.startswith("accuracy/") for name in records[-1])
    assert isinstance(vl.load(tuned).ask(None, "What shape is it?", max_new_tokens=2), str)
