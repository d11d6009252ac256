"""The parameters that a run begins with, and those that a run has come to."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax

from vllama2_jax.checkpoints import CheckpointError, ModelCard
from vllama2_jax.checkpoints.card import read_card
from vllama2_jax.checkpoints.run import (
    RunCheckpoints,
    check_frozen,
    fingerprints,
    read_run_card,
    run_card_folder,
)
from vllama2_jax.checkpoints.store import TOKENIZER, flatten, float_dtype, unflatten
from vllama2_jax.convert.parts import describe_decoder, read_audio, read_decoder, read_vision
from vllama2_jax.models.axes import Layout
from vllama2_jax.models.config import AudioConnectorConfig, VLlama2Config, config_from_dict
from vllama2_jax.models.vllama2 import init_params
from vllama2_jax.models.zoo import connector_config, model_config
from vllama2_jax.parallel.placing import place
from vllama2_jax.parallel.sharding import param_axes, param_shardings, shardings
from vllama2_jax.text import Tokenizer
from vllama2_jax.train.config import RANDOM, STORED, StartConfig, TrainConfig
from vllama2_jax.train.initial import initial_params
from vllama2_jax.train.lora import adapt, merge
from vllama2_jax.train.trainable import Rule, assign_rules, combine, partition
from vllama2_jax.weights import describe, find, local, read


def describe_start(start: StartConfig) -> tuple[ModelCard, Path]:
    """The card and the tokenizer's directory of what `begin` makes, without reading weights.

    Raises:
      CheckpointError: if a part cannot be found.
      ValueError: if the parts do not make a model, saying why.
    """
    for part in ("connector", "audio_connector"):
        if getattr(start, part) not in (STORED, RANDOM):
            raise ValueError(
                f"start.{part} {getattr(start, part)!r} must be {STORED!r} or {RANDOM!r}; a "
                "connector comes with its model, or anew"
            )
    if STORED in (start.vision, start.connector, start.decoder):
        card, tokenizer = describe(start.model)
        config = card.config
    else:
        card, tokenizer, config = None, None, model_config(start.model)
    if start.decoder not in (STORED, RANDOM):
        card, tokenizer = describe_decoder(start.decoder, config)
    if card is None:
        raise ValueError(
            f"start.model {start.model!r}: no part comes with a tokenizer; let the decoder be "
            f"{STORED!r} or name a language model"
        )
    if start.connector_kind:
        if start.connector != RANDOM:
            raise ValueError(
                f"start.connector_kind {start.connector_kind!r} is for a connector that begins "
                f"{RANDOM!r}, not {start.connector!r}"
            )
        widths = config.vision.width, config.decoder.width
        connector = connector_config(start.connector_kind, *widths)
        if connector.depth and config.connector.depth:  # as deep as the model's own, if both are
            connector = dataclasses.replace(connector, depth=config.connector.depth)
        config = dataclasses.replace(config, connector=connector)
    if start.hearing:
        config = _with_hearing(start, config)
    elif start.audio_connector_kind:
        raise ValueError(
            f"start.audio_connector_kind {start.audio_connector_kind!r} is for what start.hearing "
            "adds; name a model there"
        )
    return dataclasses.replace(card, config=config), tokenizer


def _with_hearing(start: StartConfig, config: VLlama2Config) -> VLlama2Config:
    """The network with the audio tower and connector that `start.hearing` names."""
    if config.audio:
        raise ValueError(
            f"start.hearing {start.hearing!r} is for a model that does not hear; {start.model} does"
        )
    if STORED in (start.audio, start.audio_connector):
        raise ValueError(
            f"start.hearing {start.hearing!r}: let start.audio be {RANDOM!r} or a file, and "
            f"start.audio_connector {RANDOM!r}; {start.model} stores neither"
        )
    other = model_config(start.hearing)
    if other.audio is None:
        raise ValueError(f"start.hearing {start.hearing!r} does not hear either; try 2.1-7B-AV")
    kind = start.audio_connector_kind or other.audio_connector.kind
    connector = AudioConnectorConfig(kind, other.audio.width, config.decoder.width)
    return dataclasses.replace(config, audio=other.audio, audio_connector=connector)


def begin(
    start: StartConfig, dtype, seed: int, progress=None, layout: Layout | None = None
) -> tuple[dict, ModelCard, Path]:
    """Read or make every part.

    Args:
      start: which.
      dtype: of the parameters; None keeps the stored one, and random ones are float32.
      seed: of random ones.
      progress: called with (tensors read, tensors in all) while importing.
      layout: how the parameters are split over devices; None is the default device alone.

    Returns:
      parameters, a nested dict with layers stacked; the model card; the tokenizer's directory.

    Raises:
      CheckpointError: if a part cannot be found or trusted.
      ValueError: if the parts do not make a model, saying why.
    """
    card, tokenizer = describe_start(start)
    parts = card.config.parts
    params, wanted = {}, {part: getattr(start, part) for part in parts}
    if STORED in wanted.values():
        stored, *_ = read(
            find(start.model), dtype, scan_layers=True, layout=layout, progress=progress
        )
        params |= {part: stored[part] for part, origin in wanted.items() if origin == STORED}
        del stored
    how = (card.config, dtype, progress, layout)
    readers = {"vision": read_vision, "decoder": read_decoder, "audio": read_audio}
    for part, read_part in readers.items():
        if wanted.get(part, STORED) not in (STORED, RANDOM):
            params[part] = read_part(wanted[part], *how)
    missing = [part for part in parts if part not in params]
    if missing:
        params |= random_parts(
            card.config, missing, seed, dtype, narrow=start.narrow, layout=layout
        )
    return params, card, tokenizer


def random_parts(
    config: VLlama2Config,
    parts: list[str],
    seed: int,
    dtype,
    *,
    narrow: bool = False,
    layout: Layout | None = None,
) -> dict:
    """New parameters of some parts, {part: nested dict}; the others are never made.

    Args:
      config: of the network.
      parts: of `PARTS`.
      seed: decides them.
      dtype: of the parameters; None is float32.
      narrow: see `StartConfig`.
      layout: how they are split over devices; each device then makes its own share.
    """

    def make():
        if narrow:
            params = initial_params(config, seed)
        else:
            params = nn.meta.unbox(init_params(config, jax.random.key(seed)))
        return jax.tree.map(lambda x: x.astype(dtype or x.dtype), {p: params[p] for p in parts})

    if layout is None:
        return jax.jit(make)()
    where = param_shardings(layout, config, flatten(jax.eval_shape(make)))
    return jax.jit(make, out_shardings=unflatten(where))()


class Prepared(NamedTuple):
    """Parameters as a run holds them.

    Attributes:
      trainable: {path: array} of what trains.
      frozen: {path: array} of what does not.
      assigned: {path: rule} of both.
      reference: {path: fingerprint} of what is frozen and came from elsewhere. It is taken before
        anything is quantised, since float sums, as of scales, differ between platforms.
    """

    trainable: dict[str, jax.Array]
    frozen: dict[str, jax.Array]
    assigned: dict[str, Rule]
    reference: dict[str, str]


def prepare(
    params: dict,
    start: StartConfig,
    rules: tuple[Rule, ...],
    dtype,
    seed: int,
    named: dict[str, tuple[str, ...]] | None = None,
    layout: Layout | None = None,
) -> Prepared:
    """Put adapters where rules want them, and part what trains from what does not.

    Args:
      params: of `begin`; emptied.
      start: as `begin` had it.
      rules: what trains.
      dtype: of what is frozen, before it is quantised.
      seed: of new adapters.
      named: of `parallel.sharding.param_axes`, where there is a layout.
      layout: how arrays are split over devices.

    Raises:
      ValueError: as `assign_rules` and `adapt` do.
    """
    assigned, flat = assign_rules(rules, params), flatten(params)
    params.clear()
    kept = [path for path, rule in assigned.items() if rule.action != "train"]
    for path in kept:
        flat[path] = flat[path].astype(dtype)
    parts = {path.split("/", 1)[0] for path in flat}
    made = tuple(f"{part}/" for part in parts if getattr(start, part) == RANDOM)
    reference = fingerprints({p: flat[p] for p in sorted(kept) if not p.startswith(made)})
    params = adapt(unflatten(flat), rules, jax.random.key(seed))
    if layout:
        flat = flatten(params)
        params = unflatten(place(flat, shardings(layout, flat, named)))
    assigned = assign_rules(rules, params)
    return Prepared(*partition(params, assigned), assigned, reference)


def read_run(
    folder: Path, dtype, progress=None, layout: Layout | None = None
) -> tuple[dict, ModelCard, Path]:
    """The newest weights of a run, as `weights.read` gives those of other models.

    Adapters are merged into the kernels that they adapt.

    Raises:
      CheckpointError: if the run has no checkpoint, or what it began with has changed.
    """
    run = read_run_card(folder)
    try:
        start = config_from_dict(StartConfig, run.start)
        rules = tuple(config_from_dict(Rule, rule) for rule in run.rules)
    except ValueError as error:
        raise CheckpointError(f"{folder}: its run.json cannot be understood ({error})") from None
    with RunCheckpoints(folder, read_only=True) as checkpoints:
        if checkpoints.latest is None:
            raise CheckpointError(f"{folder}: the run has no checkpoint yet; train on")
        stored = checkpoints.stored(checkpoints.latest)
    params, card, _ = begin(start, None, run.seed, progress, layout)
    named = layout and param_axes(card.config)
    prepared = prepare(params, start, rules, float_dtype(run.dtype), run.seed, named, layout)
    check_frozen(folder, run.frozen, prepared.reference)
    frozen = prepared.frozen
    shapes = {
        path: jax.ShapeDtypeStruct(x.shape, stored[path].dtype, sharding=layout and x.sharding)
        for path, x in prepared.trainable.items()
    }
    del params, prepared  # what was trained takes the place of what it began with
    with RunCheckpoints(folder, read_only=True) as checkpoints:
        trained = checkpoints.restore_trainable(checkpoints.latest, shapes)
    params = merge(combine(trained, frozen), dtype or float_dtype(run.dtype))
    params = jax.tree.map(lambda x: x.astype(dtype or x.dtype), params)
    card_folder = run_card_folder(folder)
    return params, read_card(card_folder), local(card_folder / TOKENIZER)


def trained_card(card: ModelCard, config: TrainConfig, tokenizer: Tokenizer) -> ModelCard:
    """The card of the model that a run makes: its media are read as in training."""
    preset = dataclasses.replace(card.preset, square_pad=config.data.square_pad)
    return dataclasses.replace(card, preset=preset, tokenizer=tokenizer.fingerprint())
