"""One training step of a miniature against PyTorch: loss, every gradient, and AdamW's update.

The oracle assembles embeddings and labels by the original's rules for itself; gradients find their
places through the tables that import weights.
"""

import copy
import dataclasses
import functools
import re
import types

import jax
import numpy as np
import optax
import pytest

from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.convert.hf_config import model_from_json, read_json
from vllama2_jax.convert.huggingface import read_params
from vllama2_jax.models.vllama2 import Batch, VLlama2
from vllama2_jax.text import (
    choose_template,
    load_tokenizer,
    plain_example,
    sft_example,
    supervise,
)
from vllama2_jax.train.loss import LossConfig, batch_loss
from vllama2_jax.train.optimizer import OptimizerConfig, make_optimizer
from vllama2_jax.train.step import init_state, make_step
from vllama2_jax.train.trainable import Rule, assign_rules, partition

torch = pytest.importorskip("torch")
import oracle  # noqa: E402

LEARNING_RATE = 1e-3
STEPS = 4  # frames of a clip
PLACEHOLDERS = {"<image>": -200, "<video>": -201, "<audio>": -202}
CONVERSATIONS = [
    ["<video>\nWhat is shown in the video?", "A cat.", "And then?", "It sleeps in the sun."],
    ["Who helps whom?", "The user helps the assistant, as it should be."],
    ["<image>\nWhat?", "A system."],
]
PRETRAIN = (Rule("connector/.*", "train"), Rule(".*", "freeze"))
SFT = (Rule("vision/.*", "freeze"), Rule(".*", "train"))
TEXT = (Rule("decoder/.*", "train"), Rule(".*", "freeze"))


def messages(conversation):
    roles = ("user", "assistant") * (len(conversation) // 2)
    return [{"role": r, "content": c} for r, c in zip(roles, conversation, strict=True)]


def miniature(folder, family, tower, connector):
    """(oracle, its configuration): three networks, the connector of one block per stage."""
    model = oracle.write_miniature(folder, family, tower, connector, num_frames=STEPS)
    config = model_from_json(read_json(folder / "config.json"), "test")
    shallow = dataclasses.replace(config.connector, depth=1)
    model.connector = oracle.Connector(connector, shallow.in_dim, shallow.out_dim, depth=1)
    oracle._randomise(model.connector)
    return model, dataclasses.replace(config, connector=shallow)


# The original's rules, for the oracle.


def to_ids(text, tokenizer):
    """Every stretch between placeholders by itself; placeholders are negative."""
    ids = []
    for piece in re.split("(<image>|<video>|<audio>)", text):
        if piece in PLACEHOLDERS:
            ids.append(PLACEHOLDERS[piece])
        elif piece:
            ids += tokenizer(piece, add_special_tokens=False).input_ids
    return ids


def sft_labels(conversation, tokenizer):
    """Ids, and labels: -100 from the end of a turn to the end of history, question and cue."""

    def length(turns, cue):
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=cue)
        return to_ids(text, tokenizer)

    turns = messages(conversation)
    ids = length(turns, False)
    labels, end = list(ids), 0
    for answer in range(1, len(turns), 2):
        prompt = len(length(turns[:answer], True))
        labels[end:prompt] = [-100] * (prompt - end)
        end = len(length(turns[: answer + 1], False))
    return ids, labels


def plain_labels(conversation, tokenizer):
    """Ids of question, space, answer; all are labels but the placeholder."""
    ids = to_ids(" ".join(conversation), tokenizer)
    return ids, [-100 if token < 0 else token for token in ids]


def media_features(model, frames):
    """Connector tokens of uint8 [T, S, S, 3], with gradients for the connector alone."""
    from PIL import Image

    images = [Image.fromarray(frame) for frame in frames]
    pixels = model.processor(images=images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = model.tower(pixels, output_hidden_states=True).hidden_states[-2]
    if type(model.tower).__name__.startswith("CLIP"):
        hidden = hidden[:, 1:]
    return model.connector(hidden[None])[0]


def spliced(model, rows):
    """(embeddings, attention mask, labels) of rows (ids, labels, features or None), padded right.

    The text in front, the features labelled -100, and so on; a placeholder's own label is dropped.
    """
    table = model.language.get_input_embeddings()
    embeddings, labels = [], []
    for ids, row_labels, features in rows:
        parts, targets, begin = [], [], 0
        for place in [i for i, token in enumerate(ids) if token < 0]:
            parts += [table(torch.tensor(ids[begin:place], dtype=torch.long)), features]
            targets += row_labels[begin:place] + [-100] * len(features)
            begin = place + 1
        parts.append(table(torch.tensor(ids[begin:], dtype=torch.long)))
        embeddings.append(torch.cat(parts))
        labels.append(torch.tensor(targets + row_labels[begin:]))
    lengths = [len(row) for row in labels]
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    mask = pad([torch.ones(length, dtype=torch.long) for length in lengths])
    return pad(embeddings), mask, pad(labels, padding_value=-100), lengths


def as_ours(model, config, value):
    """value(parameter) of the oracle's parameters as our nested ones, by the import's tables."""
    networks = copy.deepcopy(model.networks)
    with torch.no_grad():
        for network, original in zip(networks, model.networks, strict=True):
            for target, parameter in zip(network.parameters(), original.parameters(), strict=True):
                target.copy_(value(parameter))
    state = oracle.released_state(*networks)
    source = types.SimpleNamespace(
        shapes={name: tuple(tensor.shape) for name, tensor in state.items()},
        read=lambda name: state[name].numpy(),
    )
    return read_params(source, config, "the test", np.float32, scan_layers=True)


def gradient(parameter):
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def itself(parameter):
    return parameter


# The step of the package.


def our_batch(model, config, stage, frames):
    """The conversations through the package's own text code, one to a row."""
    tokenizer = load_tokenizer(model.folder)
    template = choose_template(config.decoder.family, tokenizer)
    rows = []
    for conversation in CONVERSATIONS:
        has_media = conversation[0].startswith("<")
        if stage is PRETRAIN and has_media:
            example = plain_example(messages(conversation[:2]), tokenizer)
        else:
            example = sft_example(messages(conversation), template, tokenizer)
        if stage is TEXT and has_media:
            continue
        rows.append(supervise(example, config.num_media_tokens() if has_media else 0))
    length = max(len(row.tokens) for row in rows) + 3  # a bucket is longer than its rows
    if stage is TEXT:
        rows, media = rows + rows[:1], dict(frames=None, clip_frames=None, clip_mask=None)
    else:
        clip_frames = np.tile(np.arange(STEPS, dtype=np.int32), (3, 1, 1))
        clip_frames[2] = 0  # an image is one frame, repeated over time
        clip_mask = np.array([[True], [False], [True]])
        media = dict(frames=frames, clip_frames=clip_frames, clip_mask=clip_mask)
    return Batch(**media, **padded(rows, length))


def padded(rows, length):
    """The text arrays of a `Batch` with one sample a row."""

    def stack(arrays, fill=0):
        return np.stack([np.pad(a, (0, length - len(a)), constant_values=fill) for a in arrays])

    return dict(
        tokens=stack(row.tokens for row in rows),
        targets=stack(row.targets for row in rows),
        target_weights=stack(row.target_weights for row in rows),
        media_index=stack((row.media_index for row in rows), fill=-1),
        positions=stack(np.arange(len(row.tokens), dtype=np.int32) for row in rows),
        segment_ids=stack(np.ones(len(row.tokens), np.int32) for row in rows),
    )


def step_once(params, config, rules, batch, loss_config):
    """(metrics, {path: gradient}, {path: parameter behind the update}) of one compiled step."""
    assigned = assign_rules(rules, params)
    trainable, frozen = partition(params, assigned)
    optimizer = make_optimizer(OptimizerConfig(LEARNING_RATE, warmup_ratio=0), 10, assigned)
    model = VLlama2(config, moe_backend="ragged_dot")
    loss = functools.partial(batch_loss, model, config=loss_config)
    with jax.default_matmul_precision("highest"):
        step = make_step(loss, optimizer)
        state, metrics = step(init_state(trainable, optimizer), frozen, batch)
    adam = next(
        s
        for s in jax.tree.leaves(state.optimizer, is_leaf=lambda s: hasattr(s, "mu"))
        if isinstance(s, optax.ScaleByAdamState)
    )
    # Behind the first step the first moment is (1 - b1) times the gradient.
    gradients = {path: np.asarray(mu) / (1 - 0.9) for path, mu in adam.mu.items()}
    return metrics, gradients, state.trainable


def compare(model, config, rules, loss, ours):
    """Hold loss, gradients and update against the oracle, whose `loss` has a graph."""
    metrics, gradients, updated = ours
    assert abs(float(metrics["loss"]) - loss.item()) <= 1e-5
    parameters = [p for network in model.networks for p in network.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0)
    loss.backward()
    wanted = as_ours(model, config, gradient)
    assigned = assign_rules(rules, wanted)
    wanted = flatten(wanted)
    before = flatten(as_ours(model, config, itself))
    optimizer.step()
    after = flatten(as_ours(model, config, itself))
    assert set(gradients) == {path for path, rule in assigned.items() if rule.action == "train"}
    largest = max(np.abs(wanted[path]).max() for path in gradients)
    errors = {}
    for path, ours in gradients.items():
        reference = np.asarray(wanted[path])
        scale = np.abs(reference).max()
        if path.endswith("audio/blocks/attention/key/bias"):
            # It moves all logits of a query alike, so its gradient is rounding noise.
            assert max(scale, np.abs(ours).max()) < 1e-5 * largest
            continue
        assert scale > 0, path
        errors[path] = np.abs(ours - reference).max() / scale
        # Adam divides a gradient by its size: the update of one that is rounding noise is noise.
        clear = np.abs(reference) > 1e-3 * scale
        start = np.asarray(before[path])
        moved, should = (np.asarray(new[path]) - start for new in (updated, after))
        np.testing.assert_allclose(moved[clear], should[clear], atol=1e-3 * LEARNING_RATE)
        assert np.abs(moved).max() <= 1.001 * LEARNING_RATE
    assert max(errors.values()) <= 1e-4, sorted(errors.items(), key=lambda e: -e[1])[:5]


@pytest.mark.parametrize(
    "stage, family, tower, connector",
    [
        pytest.param(PRETRAIN, "mistral", "clip", "stc_connector", id="pretrain-mistral-clip"),
        pytest.param(SFT, "qwen2", "siglip", "stc_connector_v35", id="sft-qwen2-siglip"),
    ],
)
def test_step_on_video_text_and_image_rows_equals_torch(tmp_path, stage, family, tower, connector):
    model, config = miniature(tmp_path, family, tower, connector)
    params = as_ours(model, config, itself)
    size = config.vision.image_size
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (3, STEPS, size, size, 3), np.uint8)
    clips = [frames[0], None, np.repeat(frames[2, :1], STEPS, axis=0)]
    rows = []
    for conversation, clip in zip(CONVERSATIONS, clips, strict=True):
        plain = stage is PRETRAIN and clip is not None
        labelled = (
            plain_labels(conversation[:2], model.tokenizer)
            if plain
            else sft_labels(conversation, model.tokenizer)
        )
        rows.append((*labelled, None if clip is None else media_features(model, clip)))
    embeddings, mask, labels, lengths = spliced(model, rows)
    loss = model.language(inputs_embeds=embeddings, attention_mask=mask, labels=labels).loss

    batch = our_batch(model, config, stage, frames)
    assert len(set(lengths)) == 3
    ours = step_once(params, config, stage, batch, LossConfig(chunk=16))
    assert float(ours[0]["tokens"]) == sum(lengths)
    assert float(ours[0]["supervised_tokens"]) == int((labels[:, 1:] != -100).sum())
    compare(model, config, stage, loss, ours)


def test_step_with_load_balancing_equals_torch_mixtral(tmp_path):
    model, config = miniature(tmp_path, "mixtral", "clip", "stc_connector")
    params = as_ours(model, config, itself)
    batch = our_batch(model, config, TEXT, None)
    row = (*sft_labels(CONVERSATIONS[1], model.tokenizer), None)
    short = (row[0][:11], row[1][:11], None)
    embeddings, mask, labels, _ = spliced(model, [row, short])
    for name in ("tokens", "positions", "segment_ids", "targets", "target_weights"):
        getattr(batch, name)[1, 11:] = 0
    batch.target_weights[1, 10] = 0
    model.language.router_aux_loss_coef = 0.02
    loss = model.language(
        inputs_embeds=embeddings, attention_mask=mask, labels=labels, output_router_logits=True
    ).loss
    ours = step_once(params, config, TEXT, batch, LossConfig(load_balancing=0.02))
    assert float(ours[0]["load_balancing"]) > 1
    compare(model, config, TEXT, loss, ours)
