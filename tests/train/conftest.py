"""What the tests of whole runs share: a model small enough to train in seconds, and clips."""

import dataclasses
import json

import flax.linen as nn
import jax
import pytest
from miniature import MINIATURE

from vllama2_jax.checkpoints import GenerationDefaults, ModelCard, save_model
from vllama2_jax.checkpoints.store import TOKENIZER
from vllama2_jax.convert.hf_config import image_spec
from vllama2_jax.data.toybox.files import write_toybox
from vllama2_jax.media.preset import REFERENCE
from vllama2_jax.models.vllama2 import init_params
from vllama2_jax.text import load_tokenizer, tokenizer_files
from vllama2_jax.train.config import (
    DataConfig,
    SaveConfig,
    SourceConfig,
    StartConfig,
    TrainConfig,
)
from vllama2_jax.train.optimizer import OptimizerConfig
from vllama2_jax.train.trainable import Rule
from vllama2_jax.weights import TINY


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Runs of the same program share it, as long as the session lasts."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("programs")), 0.1), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """The folder of a saved model: the miniature with the vocabulary of `tiny`."""
    tokenizer = load_tokenizer(TINY / TOKENIZER)
    decoder = dataclasses.replace(MINIATURE.decoder, vocab_size=640)
    config = dataclasses.replace(MINIATURE, decoder=decoder)
    card = ModelCard(
        config=config,
        image=image_spec(config.vision),
        preset=REFERENCE,
        generation=GenerationDefaults(stop_ids=(tokenizer.eos_id,)),
        template="chatml",
        tokenizer=tokenizer.fingerprint(),
    )
    folder = tmp_path_factory.mktemp("small") / "model"
    params = nn.meta.unbox(init_params(config, jax.random.key(3)))
    save_model(folder, params, card, tokenizer_files(TINY / TOKENIZER))
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A small Toybox."""
    folder = tmp_path_factory.mktemp("clips") / "toybox"
    write_toybox(folder, 8, seed=1, families=("motion", "order", "count", "change"))
    # Words alone, beside what is about clips.
    records = json.loads((folder / "train.json").read_text())
    said = [{"from": "human", "value": "What is red?"}, {"from": "gpt", "value": "a circle"}]
    records += [{"id": f"words-{i}", "dataset": "words", "conversations": said} for i in range(4)]
    (folder / "train.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="session")
def small_run(small_model, clips):
    """A run of 12 steps of 4 rows; connector and decoder train."""
    return TrainConfig(
        name="small",
        start=StartConfig(str(small_model)),
        rules=(Rule("vision/.*", "freeze"), Rule(".*", "train")),
        data=DataConfig(
            (SourceConfig("toybox", str(clips / "train.json")),), max_tokens=120, workers=0
        ),
        optimizer=OptimizerConfig(1e-2),
        rows=4,
        epochs=None,
        steps=12,
        dtype="float32",
        save=SaveConfig(every=4),
        seed=5,
    )
