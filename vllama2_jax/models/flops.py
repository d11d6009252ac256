"""How many floating-point operations a forward pass takes, from the shapes alone.

Counted are matrix products and convolutions, two operations per multiply-add, as PaLM (appendix B)
and MaxText count them; embeddings, norms, softmax, activations and pooling are not. Every slot of a
batch counts, padding too, and causal attention counts half of its square.
"""

import dataclasses
import math

from vllama2_jax.models.config import (
    AudioConnectorConfig,
    BeatsConfig,
    ConnectorConfig,
    DecoderConfig,
    ViTConfig,
    VLlama2Config,
)


@dataclasses.dataclass(frozen=True)
class Product:
    """Products of one kind.

    Attributes:
      name: beginning with the part, "decoder/mlp/down".
      flops: of the forward pass.
      weights: one factor is a parameter; else both are activations, as in attention.
      entry: the other factor is the part's own input, or its mean.
    """

    name: str
    flops: int
    weights: bool = True
    entry: bool = False

    @property
    def part(self) -> str:
        """One of `PARTS`."""
        return self.name.split("/", 1)[0]


def forward_flops(
    config: VLlama2Config,
    *,
    rows: int,
    length: int,
    frames: int,
    clips: int,
    sounds: int = 0,
    steps: int | None = None,
) -> dict[str, int]:
    """FLOPs of a forward pass, logits of all slots included, by kind of product.

    `attention/scores` are both products among tokens, queries with keys and weights with values.

    Args:
      config: the shapes. Of a mixture of experts, the `top_k` that a token goes to count.
      rows: of the batch.
      length: slots of a row.
      frames: distinct frames of a row, which the tower sees; 0 for text alone.
      clips: clips of a row, which the connector sees; 0 for text alone.
      sounds: of a row.
      steps: time steps of a clip; None is `config.num_frames`.

    Returns:
      {name: FLOPs}; names begin with one of `PARTS`.
    """
    shape = dict(rows=rows, length=length, frames=frames, clips=clips, sounds=sounds, steps=steps)
    flops: dict[str, int] = {}
    for product in forward_products(config, **shape):
        flops[product.name] = flops.get(product.name, 0) + product.flops
    return flops


def forward_products(
    config: VLlama2Config,
    *,
    rows: int,
    length: int,
    frames: int,
    clips: int,
    sounds: int = 0,
    steps: int | None = None,
) -> list[Product]:
    """What `forward_flops` sums up, in the order in which it runs."""
    steps = config.num_frames if steps is None else steps
    products = []
    if frames:
        products += _vision(config.vision, rows * frames)
    if clips:
        products += _connector(config.connector, rows * clips, steps, config.vision.grid)
    if sounds:
        products += _audio(config.audio, rows * sounds)
        tokens = rows * sounds * config.num_sound_tokens
        products += _audio_connector(config.audio_connector, tokens)
    return products + _decoder(config.decoder, rows, length)


def _vision(config: ViTConfig, images: int) -> list[Product]:
    width, tokens = config.width, config.num_patches + config.class_token
    blocks = images * config.num_blocks_used
    patches = images * config.num_patches
    mlp = 2 * blocks * tokens * width * config.mlp_dim
    return [
        Product("vision/patch_embed", 2 * patches * 3 * config.patch_size**2 * width, entry=True),
        Product("vision/attention/projections", 4 * 2 * blocks * tokens * width**2),
        Product("vision/attention/scores", 2 * 2 * blocks * tokens**2 * width, weights=False),
        Product("vision/mlp/fc1", mlp),
        Product("vision/mlp/fc2", mlp),
    ]


def _audio(config: BeatsConfig, sounds: int) -> list[Product]:
    width, tokens = config.width, sounds * config.num_tokens
    layers = tokens * config.num_layers
    taps = config.conv_window * width // config.conv_groups
    mlp = 2 * layers * width * config.mlp_dim
    products = [
        Product(
            "audio/patch_embed", 2 * tokens * config.patch_size**2 * config.patch_width, entry=True
        ),
        Product("audio/positions", 2 * tokens * taps * width),
        Product("audio/attention/projections", 4 * 2 * layers * width**2),
        Product("audio/attention/gate", 2 * layers * width * 8),
        Product(
            "audio/attention/scores", 2 * 2 * layers * config.num_tokens * width, weights=False
        ),
        Product("audio/mlp/fc1", mlp),
        Product("audio/mlp/fc2", mlp),
    ]
    if config.patch_width != width:
        products.insert(1, Product("audio/patch_project", 2 * tokens * config.patch_width * width))
    return products


def _audio_connector(config: AudioConnectorConfig, tokens: int) -> list[Product]:
    wide = [config.in_dim] + [config.out_dim] * (config.depth - 1)
    return [
        Product("audio_connector/layers", 2 * tokens * into * config.out_dim, entry=index == 0)
        for index, into in enumerate(wide)
    ]


def _connector(config: ConnectorConfig, clips: int, steps: int, grid: int) -> list[Product]:
    out, tokens = config.out_dim, clips * config.num_tokens(steps, grid)
    width, products = config.in_dim, []
    if config.sampler != "mean":
        if config.depth:
            products += _stage("connector/stage1", config.depth, clips * steps, grid**2, width, out)
            width = out
        if config.sampler == "conv":
            flops = 2 * tokens * math.prod(config.downsample) * width * out
            products.append(Product("connector/sampler", flops, entry=not products))
            width = out
        if config.depth:
            window, padding = config.downsample[0], config.padding[0]
            images = clips * ((steps + 2 * padding - window) // window + 1)
            stage = _stage("connector/stage2", config.depth, images, tokens // images, width, out)
            products += [dataclasses.replace(product, entry=False) for product in stage]
    for _ in range(config.mlp_depth):
        flops = 2 * tokens * width * out
        products.append(Product("connector/readout", flops, entry=not products))
        width = out
    return products


def _stage(name, depth: int, images: int, pixels: int, into: int, out: int) -> list[Product]:
    """A RegStage over images of so many pixels, `into` channels to `out`."""
    products = []
    for index in range(depth):
        positions = images * pixels
        squeezed = round(into / 4)
        ways_in = 1 if into == out else 2  # the first 1x1 convolution, and the shortcut's
        inner = 2 * positions * 9 * out  # depthwise
        inner += 2 * 2 * images * out * squeezed  # squeeze and excitation
        inner += 2 * positions * out * out
        products += [
            Product(name, ways_in * 2 * positions * into * out, entry=index == 0),
            Product(name, inner),
        ]
        into = out
    return products


def _decoder(config: DecoderConfig, rows: int, length: int) -> list[Product]:
    width, slots = config.width, rows * length
    heads, kv_heads = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
    layers = slots * config.num_layers
    # Four times the pairs of query and key: half a square, without the corner beyond a window.
    reach = min(length, config.sliding_window or length)
    pairs = 4 * length * reach - 2 * reach**2
    name, copies = ("moe", config.top_k) if config.num_experts else ("mlp", 1)
    mlp = 2 * layers * copies * width * config.mlp_dim
    products = [
        Product("decoder/attention/projections", 2 * layers * width * 2 * (heads + kv_heads)),
        Product(
            "decoder/attention/scores", rows * config.num_layers * pairs * heads, weights=False
        ),
    ]
    if config.num_experts:
        products.append(Product("decoder/moe/router", 2 * layers * width * config.num_experts))
    return [
        *products,
        Product(f"decoder/{name}/gate_up", 2 * mlp),
        Product(f"decoder/{name}/down", mlp),
        Product("decoder/lm_head", 2 * slots * width * config.vocab_size),
    ]
