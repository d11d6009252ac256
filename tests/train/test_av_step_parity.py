"""One step of each stage with sound against PyTorch, on rows of every kind in one batch."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from vllama2_jax.convert.hf_card import OWN, OwnFields
from vllama2_jax.convert.hf_config import model_from_json, read_json
from vllama2_jax.data.collate import Part, pack_clips, pack_rows, pack_sounds
from vllama2_jax.media import Clip
from vllama2_jax.models.config import config_from_dict
from vllama2_jax.models.vllama2 import Batch
from vllama2_jax.text import (
    audio_plain_example,
    choose_template,
    load_tokenizer,
    sft_example,
    supervise,
)
from vllama2_jax.train.loss import LossConfig
from vllama2_jax.train.trainable import Rule

torch = pytest.importorskip("torch")
sys.path.append(str(Path(__file__).parents[1]))
import oracle  # noqa: E402
from av_oracle import write_av_miniature  # noqa: E402
from test_step_parity import (  # noqa: E402
    STEPS,
    as_ours,
    compare,
    itself,
    media_features,
    messages,
    sft_labels,
    spliced,
    step_once,
)

FROZEN = Rule(".*", "freeze")
RULES = {
    "audio_pretrain": (Rule("audio_connector/.*", "train"), FROZEN),
    "audio_sft": (Rule("audio/.*", "train"), Rule("audio_connector/.*", "train"), FROZEN),
    "av_joint": (Rule("(connector|audio_connector|decoder)/.*", "train"), FROZEN),
    "av_joint as released": (Rule("vision/.*", "freeze"), Rule(".*", "train")),
}
# (pictures, sound) of each row, and what is said about them
ROWS = [
    ("video", True, ["<video>\nWhat is heard and seen?", "A cat.", "And then?", "It sleeps."]),
    ("", False, ["Who helps whom?", "The user helps the assistant, as it should be."]),
    ("image", False, ["<image>\nWhat?", "A system."]),
    ("", True, ["<audio>\nWhat is heard?", "The user."]),
    ("video", False, ["<video>\nWhat is seen?", "The assistant."]),
]
SOUNDS = [
    ("", True, ["<audio>\nCaption it.", "The user helps."]),
    ("", True, ["<audio>\nWhat?", "A system, as it should be."]),
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(oracle, its configuration), the connector of one block per stage, two seconds of sound."""
    folder = tmp_path_factory.mktemp("av")
    model = write_av_miniature(folder, seconds=2.0)
    data = read_json(folder / "config.json")
    own = config_from_dict(OwnFields, data[OWN])
    config = model_from_json(data, "test", audio=own.audio)
    shallow = dataclasses.replace(config.connector, depth=1)
    model.connector = oracle.Connector(shallow.kind, shallow.in_dim, shallow.out_dim, depth=1)
    oracle._randomise(model.connector)
    return model, dataclasses.replace(config, connector=shallow)


def clip_of(kind, rng, size):
    frames = rng.integers(0, 256, (STEPS, size, size, 3), np.uint8)
    index = np.arange(STEPS, dtype=np.int32)
    if kind == "image":
        frames, index = frames[:1], np.zeros(STEPS, np.int32)
    return Clip(frames, index, np.full(len(frames), np.nan), "", kind == "image")


def bare_labels(conversation, tokenizer):
    """Captions of the audio-visual branch: the question is its placeholder alone."""
    return sft_labels(["<audio>", conversation[1]], tokenizer)


@pytest.mark.parametrize("stage", RULES)
def test_step_equals_torch(pair, stage):
    model, config = pair
    for network in model.networks:
        network.zero_grad()
    rows = SOUNDS if stage == "audio_pretrain" else ROWS
    params = as_ours(model, config, itself)
    rng = np.random.default_rng(0)
    tokenizer = load_tokenizer(model.folder)
    template = choose_template(config.decoder.family, tokenizer)
    theirs, parts = [], []
    for kind, heard, conversation in rows:
        clip = clip_of(kind, rng, config.vision.image_size) if kind else None
        bank = None
        if heard:
            shape = (config.audio.num_frames, 128)
            bank = rng.normal(15, 6, shape).astype(np.float32)
        features = [media_features(model, clip.frames[clip.frame_index])] if kind else []
        features += [model.hear(bank)] if heard else []
        if stage == "audio_pretrain":
            labels = bare_labels(conversation, model.tokenizer)
            example = audio_plain_example(messages(conversation), template, tokenizer)
        else:
            labels = sft_labels(conversation, model.tokenizer)
            example = sft_example(messages(conversation), template, tokenizer)
        theirs.append((*labels, torch.cat(features) if features else None))
        slots = bool(kind) * config.num_media_tokens() + heard * config.num_sound_tokens
        example = supervise(example, [slots] if slots else [])
        parts.append([Part(example, bool(kind), heard, clip, bank)])
    embeddings, mask, labels, lengths = spliced(model, theirs)
    loss = model.language(inputs_embeds=embeddings, attention_mask=mask, labels=labels).loss

    clips = int(any(kind for kind, *_ in rows))
    sizes = (config.num_media_tokens(), config.num_sound_tokens)
    arrays = pack_rows(parts, max(lengths) + 3, clips, *sizes)
    if clips:
        arrays |= pack_clips(parts, 1, STEPS, config.vision.image_size)
    arrays |= pack_sounds(parts, 1, config.audio.num_frames)
    ours = step_once(params, config, RULES[stage], Batch(**arrays), LossConfig(chunk=64))
    assert float(ours[0]["tokens"]) == sum(lengths)
    compare(model, config, RULES[stage], loss, ours)
