"""The roofline of `roofline.py` beside what MaxText has measured on the same chips.

No program is compiled for these rows: what is moved and sent is assumed, see `ASSUMED`.
"""

import dataclasses

from vllama2_jax.models.config import DecoderConfig, VLlama2Config
from vllama2_jax.models.flops import Product, forward_products
from vllama2_jax.models.zoo import CLIP_L_336, MIXTRAL_8X7B, connector_config
from vllama2_jax.parallel.collectives import Collective
from vllama2_jax.parallel.links import Placement
from vllama2_jax.parallel.roofline import Roofline, moved_bytes, roofline
from vllama2_jax.parallel.topology import topology

ASSUMED = (
    "Parameters are split over all chips (FSDP). Every layer's weights are gathered in bfloat16 "
    "for the forward pass and for the backward pass, and its gradients scattered in bfloat16.",
    "`hidden`: all of this overlaps with computation; `exposed`: none of it does.",
    "Saved activations are each layer's input, and with `save_dot_except_mlpwi` the results of its "
    "other products too, in bfloat16.",
    "Rows measured before MaxText's pull request 1988 count causal attention in full, where we "
    "count half: about 4 % more FLOPs at 4,096 tokens.",
)

_RECIPES = "github.com/AI-Hypercomputer/tpu-recipes"
_MAXTEXT = "github.com/AI-Hypercomputer/maxtext"

_LLAMA2_70B = DecoderConfig(
    family="llama",
    vocab_size=32000,
    width=8192,
    mlp_dim=28672,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    rope_theta=1e4,
    norm_eps=1e-5,
)

# configs/tpu/v4/22b.sh, in December 2023 with head_dim 256 and an MLP of two matrices of 24,576
# columns (configs/base.yml); three of 16,384 are as many parameters and FLOPs.
_22B = DecoderConfig(
    family="llama",
    vocab_size=32000,
    width=6144,
    mlp_dim=16384,
    num_layers=48,
    num_heads=24,
    num_kv_heads=24,
    head_dim=256,
    rope_theta=1e4,
    norm_eps=1e-5,
)

_ATTENTION = ("decoder/attention/projections", "decoder/attention/scores")
_MLP = ("decoder/mlp/gate_up", "decoder/moe/gate_up", "decoder/moe/down", "decoder/moe/router")
# What the backward pass computes again, and how many values per token and layer it keeps.
_REMAT = {
    "full": ((*_ATTENTION, *_MLP), lambda c: c.width),
    "save_dot_except_mlpwi": (
        ("decoder/attention/scores", "decoder/mlp/gate_up"),
        lambda c: 4 * c.width + 2 * c.num_kv_heads * c.head_dim,
    ),
}


@dataclasses.dataclass(frozen=True)
class _Row:
    name: str
    topology: str
    decoder: DecoderConfig
    rows: int  # per chip
    length: int
    remat: str
    state_dtype_bytes: int
    measured: float
    source: str


_ROWS = (
    _Row(
        "Mixtral-8x7B",
        "v5p-128",
        MIXTRAL_8X7B,
        rows=36,
        length=4096,
        remat="full",
        state_dtype_bytes=2,
        measured=0.5489,
        source=f"{_MAXTEXT} tests/end_to_end/tpu/mixtral/Run_Mixtral.md; batch: {_RECIPES} "
        "training/v5p/Mixtral-8X7B-Maxtext",
    ),
    # The table says "256 Chips(8x4x4)", and 8x4x4 are 128 chips, 256 cores.
    _Row(
        "Mixtral-8x7B",
        "v5p-512",
        MIXTRAL_8X7B,
        rows=36,
        length=4096,
        remat="full",
        state_dtype_bytes=2,
        measured=0.5256,
        source=f"{_MAXTEXT} docs/reference/models/tiering.md; batch: {_RECIPES} "
        "training/v5p/Mixtral-8X7B-Maxtext",
    ),
    _Row(
        "Llama2-70B",
        "v5p-1024",
        _LLAMA2_70B,
        rows=4,
        length=4096,
        remat="save_dot_except_mlpwi",
        state_dtype_bytes=4,
        measured=0.654,
        source=f"{_MAXTEXT} docs/reference/models/tiering.md, 512 chips; batch: "
        "benchmarks/maxtext_v5p_model_configs.py at 92e59fd",
    ),
    _Row(
        "22B",
        "v4-128",
        _22B,
        rows=13,
        length=2048,
        remat="full",
        state_dtype_bytes=4,
        measured=0.567,
        source=f"{_MAXTEXT} src/maxtext/configs/tpu/v4/README.md and 22b.sh",
    ),
)


@dataclasses.dataclass(frozen=True)
class Published:
    """A measured step and its rooflines.

    Attributes:
      name: of the model.
      topology: by its shape.
      batch: "64 x 36 x 4096": chips, rows of each, tokens of a row.
      measured: model FLOPs utilisation as published.
      hidden: the roofline if all collectives overlap with computation.
      exposed: the roofline if none does.
      source: where the measurement and its batch stand.
    """

    name: str
    topology: str
    batch: str
    measured: float
    hidden: Roofline
    exposed: Roofline
    source: str


def published_rows() -> list[Published]:
    """Every published row, beside its rooflines."""
    return [_published(row) for row in _ROWS]


def _published(row: _Row) -> Published:
    chips = topology(row.topology)
    n, c = chips.num_chips, row.decoder
    again, kept = _REMAT[row.remat]
    products = _products(c, rows=n * row.rows, length=row.length)
    forward = sum(product.flops for product in products)
    recomputed = sum(product.flops for product in products if product.name in again)
    weights = 2 * _parameters(c)
    common = dict(
        model_flops=3 * forward,
        chip_flops=(3 * forward + recomputed) / n,
        hbm_bytes=moved_bytes(
            weights_read=3 * weights,  # forward; gradients of inputs, and what is computed again
            weights_gathered=2 * weights,
            gradients=weights,
            state=3 * row.state_dtype_bytes * _parameters(c) / n,
            saved=2 * c.num_layers * row.rows * row.length * kept(c),
        ),
    )

    def variant(overlapped):
        group = tuple(range(n))
        sent = (
            Collective("all-gather", ("fsdp",), weights, 2, group, overlapped),
            Collective("reduce-scatter", ("fsdp",), weights // n, 1, group, overlapped),
        )
        return roofline(Placement.in_order(chips), collectives=sent, **common)

    return Published(
        row.name,
        chips.name,
        f"{n} x {row.rows} x {row.length}",
        row.measured,
        variant(True),
        variant(False),
        row.source,
    )


def _products(decoder: DecoderConfig, rows: int, length: int) -> list[Product]:
    connector = connector_config("linear", CLIP_L_336.width, decoder.width)
    config = VLlama2Config("published", CLIP_L_336, connector, decoder, num_frames=1)
    return forward_products(config, rows=rows, length=length, frames=0, clips=0)


def _parameters(decoder: DecoderConfig) -> int:
    """Of the decoder; norms are too few to count."""
    experts = decoder.num_experts / decoder.top_k if decoder.num_experts else 1
    counted = decoder.vocab_size * decoder.width
    for product in _products(decoder, rows=1, length=1):
        if product.weights:
            copies = experts if product.name in ("decoder/moe/gate_up", "decoder/moe/down") else 1
            counted += round(product.flops / 2 * copies)
    return counted
