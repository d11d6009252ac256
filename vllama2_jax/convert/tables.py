"""Which tensor of a released checkpoint is which parameter of ours, network by network.

A row says: the tensor's name and shape, the parameter's path, and the axis order that turns one
into the other (a reshape follows: our attention kernels keep heads and head_dim apart). Shapes are
written from the configuration, never from a tensor, so that a table is a check of its own; every
row is read in both directions. Names and transposes: the original's state dicts under transformers
4.40.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from vllama2_jax.models.config import (
    AudioConnectorConfig,
    BeatsConfig,
    ConnectorConfig,
    DecoderConfig,
    ViTConfig,
    VLlama2Config,
)

LINEAR = (1, 0)  # (out, in) -> (in, out)
CONV2D = (2, 3, 1, 0)  # (out, in, h, w) -> (h, w, in, out)
CONV3D = (2, 3, 4, 1, 0)  # (out, in, t, h, w) -> (t, h, w, in, out)
CONV1D = (2, 1, 0)  # (out, in / groups, taps) -> (taps, in / groups, out)
POINTWISE = CONV2D  # a 1x1 convolution; the reshape makes it a dense kernel
ASIS = None

_AUDIO_CLASSES = 527  # of AudioSet


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor and its place.

    Attributes:
      source: the tensor's name in the released checkpoint.
      shape: the tensor's shape there.
      target: the parameter's path in the tree with layers stacked, "/" between names.
      axes: permutation of the tensor's axes before it is reshaped to the parameter; None: as it is.
      index: where in the parameter's leading axes (layer, expert) the tensor goes.
    """

    source: str
    shape: tuple[int, ...]
    target: str
    axes: tuple[int, ...] | None = ASIS
    index: tuple[int, ...] = ()

    def to_parameter(self, tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor as its part of the parameter, which has `shape`."""
        if self.axes is not None:
            tensor = tensor.transpose(self.axes)
        return tensor.reshape(shape)

    def to_tensor(self, part: np.ndarray) -> np.ndarray:
        """The inverse of `to_parameter`."""
        if self.axes is None:
            return part.reshape(self.shape)
        permuted = part.reshape([self.shape[axis] for axis in self.axes])
        return permuted.transpose(np.argsort(self.axes))


def _norm(source: str, target: str, width: int, index=(), bias=True) -> Iterator[Row]:
    yield Row(f"{source}.weight", (width,), f"{target}/scale", index=index)
    if bias:
        yield Row(f"{source}.bias", (width,), f"{target}/bias", index=index)


def _linear(source: str, target: str, into: int, out: int, index=(), bias=True) -> Iterator[Row]:
    yield Row(f"{source}.weight", (out, into), f"{target}/kernel", LINEAR, index)
    if bias:
        yield Row(f"{source}.bias", (out,), f"{target}/bias", index=index)


def vision_rows(config: ViTConfig, source: str, target: str) -> Iterator[Row]:
    """A CLIP or SigLIP tower, up to the last block that the selected layer needs."""
    width, patch = config.width, config.patch_size
    embeddings = f"{source}embeddings."
    yield Row(
        f"{embeddings}patch_embedding.weight",
        (width, 3, patch, patch),
        f"{target}/patch_embed/kernel",
        CONV2D,
    )
    if config.patch_bias:
        yield Row(f"{embeddings}patch_embedding.bias", (width,), f"{target}/patch_embed/bias")
    if config.class_token:
        yield Row(f"{embeddings}class_embedding", (width,), f"{target}/class_embed")
    positions = config.num_patches + config.class_token
    yield Row(
        f"{embeddings}position_embedding.weight", (positions, width), f"{target}/position_embed"
    )
    if config.pre_norm:
        yield from _norm(f"{source}pre_layrnorm", f"{target}/pre_norm", width)
    for layer in range(config.num_blocks_used):
        block, ours, at = f"{source}encoder.layers.{layer}.", f"{target}/blocks", (layer,)
        yield from _norm(f"{block}layer_norm1", f"{ours}/norm1", width, at)
        for theirs, name in (
            ("q_proj", "query"),
            ("k_proj", "key"),
            ("v_proj", "value"),
            ("out_proj", "out"),
        ):
            yield from _linear(
                f"{block}self_attn.{theirs}", f"{ours}/attention/{name}", width, width, at
            )
        yield from _norm(f"{block}layer_norm2", f"{ours}/norm2", width, at)
        yield from _linear(f"{block}mlp.fc1", f"{ours}/mlp/fc1", width, config.mlp_dim, at)
        yield from _linear(f"{block}mlp.fc2", f"{ours}/mlp/fc2", config.mlp_dim, width, at)


def vision_ignored(config: ViTConfig, source: str) -> tuple[str, ...]:
    """Prefixes of a tower's tensors that the selected hidden state does not depend on."""
    unused = range(config.num_blocks_used, config.num_layers)
    return (
        *(f"{source}encoder.layers.{layer}." for layer in unused),
        f"{source}post_layernorm.",
        f"{source}head.",
        f"{source}embeddings.position_ids",
    )


def vision_unused(config: ViTConfig, source: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a tower's tensors that the selected state does not need."""
    used = {row.source for row in vision_rows(config, source, "")}
    whole = vision_rows(dataclasses.replace(config, select_layer=-1), source, "")
    rows = [row for row in whole if row.source not in used]
    width, head = config.width, f"{source}head."
    rows += _norm(f"{source}post_layernorm", "", width)
    if not config.class_token:
        # SigLIP's pooling: attention of one learned query, with a fused projection.
        rows += [
            Row(f"{head}probe", (1, 1, width), ""),
            Row(f"{head}attention.in_proj_weight", (3 * width, width), ""),
            Row(f"{head}attention.in_proj_bias", (3 * width,), ""),
            *_linear(f"{head}attention.out_proj", "", width, width),
            *_norm(f"{head}layernorm", "", width),
            *_linear(f"{head}mlp.fc1", "", width, config.mlp_dim),
            *_linear(f"{head}mlp.fc2", "", config.mlp_dim, width),
        ]
    return {row.source: row.shape for row in rows}


def connector_rows(config: ConnectorConfig, source: str, target: str) -> Iterator[Row]:
    """Any connector of `zoo.connector_config` that the original has code for."""
    into, out = config.in_dim, config.out_dim
    if config.sampler == "mean":
        if config.mlp_depth == 1:
            yield from _linear(source.removesuffix("."), f"{target}/readout_0", into, out)
            return
        for layer, wide in enumerate((into, *[out] * (config.mlp_depth - 1))):
            yield from _linear(f"{source}{2 * layer}", f"{target}/readout_{layer}", wide, out)
        return
    for stage in (1, 2) if config.depth else ():
        for block in range(config.depth):
            wide = into if (stage, block) == (1, 0) else out
            yield from _bottleneck(
                f"{source}s{stage}.b{block + 1}.", f"{target}/stage{stage}/block_{block}", wide, out
            )
    wide = out if config.depth else into
    if config.sampler == "conv":
        kernel = (out, wide, *config.downsample)
        yield Row(f"{source}sampler.0.weight", kernel, f"{target}/sampler/kernel", CONV3D)
        yield Row(f"{source}sampler.0.bias", (out,), f"{target}/sampler/bias")
        wide = out
    for layer in range(config.mlp_depth):
        yield from _linear(f"{source}readout.{2 * layer}", f"{target}/readout_{layer}", wide, out)
        wide = out


def _bottleneck(source: str, target: str, into: int, out: int) -> Iterator[Row]:
    """One timm RegStage bottleneck; its squeeze width follows the block's input."""
    squeeze = round(0.25 * into)
    for name, shape, ours in (
        ("conv1", (out, into, 1, 1), "1"),
        ("conv2", (out, 1, 3, 3), "2"),
        ("conv3", (out, out, 1, 1), "3"),
    ):
        yield Row(f"{source}{name}.conv.weight", shape, f"{target}/conv{ours}/kernel", CONV2D)
        yield from _norm(f"{source}{name}.bn", f"{target}/norm{ours}", out)
    for name, shape, ours in (
        ("fc1", (squeeze, out, 1, 1), "reduce"),
        ("fc2", (out, squeeze, 1, 1), "expand"),
    ):
        path = f"{target}/squeeze/{ours}"
        yield Row(f"{source}se.{name}.weight", shape, f"{path}/kernel", POINTWISE)
        yield Row(f"{source}se.{name}.bias", shape[:1], f"{path}/bias")
    if into != out:
        shape = (out, into, 1, 1)
        yield Row(f"{source}downsample.conv.weight", shape, f"{target}/shortcut/kernel", POINTWISE)
        yield from _norm(f"{source}downsample.bn", f"{target}/shortcut_norm", out)


def audio_rows(config: BeatsConfig, source: str, target: str) -> Iterator[Row]:
    """BEATs. Its position biases are stored with layer 0, whose module all layers share."""
    width, patch, embed = config.width, config.patch_size, config.patch_width
    kernel = (embed, 1, patch, patch)
    yield Row(f"{source}patch_embedding.weight", kernel, f"{target}/patch_embed/kernel", CONV2D)
    if config.patch_bias:
        yield Row(f"{source}patch_embedding.bias", (embed,), f"{target}/patch_embed/bias")
    yield from _norm(f"{source}layer_norm", f"{target}/patch_norm", embed)
    if embed != width:
        yield from _linear(f"{source}post_extract_proj", f"{target}/patch_project", embed, width)
    window, positions = config.conv_window, f"{source}encoder.pos_conv.0."
    yield Row(f"{positions}weight_g", (1, 1, window), f"{target}/positions/scale")
    kernel = (width, width // config.conv_groups, window)
    yield Row(f"{positions}weight_v", kernel, f"{target}/positions/conv/kernel", CONV1D)
    yield Row(f"{positions}bias", (width,), f"{target}/positions/conv/bias")
    yield from _norm(f"{source}encoder.layer_norm", f"{target}/norm", width)
    biases = (config.num_buckets, config.num_heads)
    yield Row(f"{source}{audio_biases(0)}", biases, f"{target}/distance_bias")
    for layer in range(config.num_layers):
        block, ours, at = f"{source}encoder.layers.{layer}.", f"{target}/blocks", (layer,)
        attention = f"{block}self_attn."
        for theirs, name in (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out")):
            path = f"{ours}/attention/{name}"
            yield from _linear(f"{attention}{theirs}_proj", path, width, width, at)
        path, head = f"{ours}/attention/gate", config.head_dim
        yield from _linear(f"{attention}grep_linear", path, head, 8, at)
        scale = (1, config.num_heads, 1, 1)
        yield Row(f"{attention}grep_a", scale, f"{ours}/attention/gate_scale", index=at)
        yield from _norm(f"{block}self_attn_layer_norm", f"{ours}/norm1", width, at)
        yield from _linear(f"{block}fc1", f"{ours}/fc1", width, config.mlp_dim, at)
        yield from _linear(f"{block}fc2", f"{ours}/fc2", config.mlp_dim, width, at)
        yield from _norm(f"{block}final_layer_norm", f"{ours}/norm2", width, at)


def audio_aliases(config: BeatsConfig, source: str, target: str) -> Iterator[Row]:
    """What repeats the position biases of layer 0.

    The original's layers share one tensor, and whichever name is read last decides, so an export
    writes it under all names.
    """
    shape = (config.num_buckets, config.num_heads)
    for layer in range(1, config.num_layers):
        yield Row(f"{source}{audio_biases(layer)}", shape, f"{target}/distance_bias")


def audio_unused(config: BeatsConfig, source: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the classifier that a fine-tuned tower brings along."""
    rows = _linear(f"{source}predictor", "", config.width, _AUDIO_CLASSES)
    return {row.source: row.shape for row in rows}


def audio_biases(layer: int) -> str:
    """The tensor of a layer's position biases; those behind layer 0 repeat it, or are left out."""
    return f"encoder.layers.{layer}.self_attn.relative_attention_bias.weight"


def audio_ignored(config: BeatsConfig, source: str) -> tuple[str, ...]:
    """Prefixes of an audio tower's tensors on which its last hidden state does not depend."""
    aliases = (f"{source}{audio_biases(layer)}" for layer in range(1, config.num_layers))
    return (*aliases, f"{source}predictor.")


def audio_connector_rows(config: AudioConnectorConfig, source: str, target: str) -> Iterator[Row]:
    """The audio connector."""
    wide = config.in_dim
    for layer in range(config.depth):
        name = f"{source}{2 * layer}" if config.depth > 1 else source.removesuffix(".")
        yield from _linear(name, f"{target}/layer_{layer}", wide, config.out_dim)
        wide = config.out_dim


def decoder_rows(config: DecoderConfig, source: str, target: str) -> Iterator[Row]:
    """A Mistral, Mixtral, Qwen2 or Llama language model; `source` stands in front of `model.`."""
    width, vocab = config.width, config.vocab_size
    model = f"{source}model."
    yield Row(f"{model}embed_tokens.weight", (vocab, width), f"{target}/embed_tokens/embedding")
    for layer in range(config.num_layers):
        yield from _decoder_layer(config, f"{model}layers.{layer}.", f"{target}/layers", (layer,))
    yield from _norm(f"{model}norm", f"{target}/final_norm", width, bias=False)
    if not config.tie_embeddings:
        yield from _linear(f"{source}lm_head", f"{target}/lm_head", width, vocab, bias=False)


def _decoder_layer(config: DecoderConfig, source: str, target: str, at) -> Iterator[Row]:
    width, mlp = config.width, config.mlp_dim
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    yield from _norm(f"{source}input_layernorm", f"{target}/input_norm", width, at, bias=False)
    for theirs, name, out in (("q", "query", queries), ("k", "key", keys), ("v", "value", keys)):
        yield from _linear(
            f"{source}self_attn.{theirs}_proj",
            f"{target}/attention/{name}",
            width,
            out,
            at,
            bias=config.qkv_bias,
        )
    yield from _linear(
        f"{source}self_attn.o_proj", f"{target}/attention/out", queries, width, at, bias=False
    )
    yield from _norm(f"{source}post_attention_layernorm", f"{target}/post_norm", width, at, False)
    if not config.num_experts:
        for name, into, out in (("gate", width, mlp), ("up", width, mlp), ("down", mlp, width)):
            yield from _linear(
                f"{source}mlp.{name}_proj", f"{target}/mlp/{name}", into, out, at, bias=False
            )
        return
    moe = f"{source}block_sparse_moe."
    yield from _linear(
        f"{moe}gate", f"{target}/moe/router", width, config.num_experts, at, bias=False
    )
    for expert in range(config.num_experts):
        for theirs, name, shape in (
            ("w1", "gate", (mlp, width)),
            ("w3", "up", (mlp, width)),
            ("w2", "down", (width, mlp)),
        ):
            tensor = f"{moe}experts.{expert}.{theirs}.weight"
            yield Row(tensor, shape, f"{target}/moe/{name}", LINEAR, (*at, expert))


# Where the parts stand in a released checkpoint (the doubled name of the tower is right).
VISION_PREFIX = "model.vision_tower.vision_tower.vision_model."
CONNECTOR_PREFIX = "model.mm_projector."
AUDIO_PREFIX = "model.audio_tower."
AUDIO_CONNECTOR_PREFIX = "model.mm_projector_a."


def model_rows(config: VLlama2Config) -> list[Row]:
    """Every tensor of a released checkpoint that is used."""
    rows = [
        *vision_rows(config.vision, VISION_PREFIX, "vision"),
        *connector_rows(config.connector, CONNECTOR_PREFIX, "connector"),
    ]
    if config.audio:
        rows += audio_rows(config.audio, AUDIO_PREFIX, "audio")
        rows += audio_connector_rows(
            config.audio_connector, AUDIO_CONNECTOR_PREFIX, "audio_connector"
        )
    return rows + list(decoder_rows(config.decoder, "", "decoder"))


def model_ignored(config: VLlama2Config) -> tuple[str, ...]:
    """Prefixes of tensors that a released checkpoint may hold and nothing depends on."""
    rotary = tuple(
        f"model.layers.{layer}.self_attn.rotary_emb." for layer in range(config.decoder.num_layers)
    )
    tied = ("lm_head.weight",) if config.decoder.tie_embeddings else ()
    audio = audio_ignored(config.audio, AUDIO_PREFIX) if config.audio else ()
    return (*vision_ignored(config.vision, VISION_PREFIX), *audio, *rotary, *tied)
