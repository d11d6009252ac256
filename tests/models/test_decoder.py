"""The decoder against transformers, against itself in other forms, and its parameters' names."""

import copy
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from decoder_oracle import FAMILIES, TINY, hf_model, params_from_hf, relative_error
from flax.core import meta

from vllama2_jax.models.cache import init_cache
from vllama2_jax.models.decoder import Decoder
from vllama2_jax.models.remat import REMAT_POLICIES
from vllama2_jax.models.stacking import unstack_layers

TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def forward(decoder, params, tokens, positions=None, segments=None):
    """Logits of a whole forward pass without a cache."""
    positions = jnp.arange(tokens.shape[1])[None] + 0 * tokens if positions is None else positions
    segments = jnp.ones_like(tokens) if segments is None else segments

    @jax.jit
    def run(params, tokens):
        def body(module):
            hidden, _ = module(module.embed(tokens), positions, segments)
            return module.logits(hidden)

        return decoder.apply({"params": params}, method=body)

    return run(params, tokens)


def step(decoder):
    """A jitted (params, tokens, positions, segments, cache) -> (logits, cache)."""

    @jax.jit
    def run(params, tokens, positions, segments, cache):
        def body(module):
            hidden, new_cache = module(module.embed(tokens), positions, segments, cache)
            return module.logits(hidden), new_cache

        return decoder.apply({"params": params}, method=body)

    return run


def random_tokens(rows, length, seed=0):
    return jnp.array(np.random.default_rng(seed).integers(0, TINY.vocab_size, (rows, length)))


def tiny(config=TINY, **options):
    """A decoder and random unboxed parameters for it."""
    decoder = Decoder(config, **options)
    x, zeros = jnp.zeros((1, 4, config.width)), jnp.zeros((1, 4), jnp.int32)
    return decoder, meta.unbox(jax.jit(decoder.init)(jax.random.key(0), x, zeros, zeros))["params"]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request):
    """A family's config, transformers model and our unrolled parameters."""
    config = FAMILIES[request.param]
    model = hf_model(config)
    return config, model, params_from_hf(model, config)


def test_logits_equal_transformers(pair):
    config, model, params = pair
    tokens = random_tokens(2, 23)
    with torch.no_grad():
        reference = model(torch.tensor(np.array(tokens))).logits.numpy()
    ours = forward(Decoder(config, scan_layers=False), params, tokens)
    assert ours.dtype == jnp.float32
    assert relative_error(ours, reference) <= TOLERANCE


def test_right_padding_changes_nothing_and_positions_are_per_row(pair):
    config, model, params = pair
    tokens, lengths = random_tokens(2, 14), (14, 9)
    segments = jnp.array([[1] * n + [0] * (14 - n) for n in lengths])
    ours = forward(Decoder(config, scan_layers=False), params, tokens, segments=segments)
    assert np.isfinite(ours).all()
    for row, length in enumerate(lengths):
        with torch.no_grad():
            alone = model(torch.tensor(np.array(tokens[row : row + 1, :length]))).logits[0]
        assert relative_error(ours[row, :length], alone.numpy()) <= TOLERANCE


def test_packed_segments_equal_separate_runs(pair):
    config, model, params = pair
    first, second = random_tokens(1, 11, seed=1), random_tokens(1, 8, seed=2)
    packed = jnp.concatenate([first, second, jnp.zeros((1, 3), first.dtype)], axis=1)
    positions = jnp.array([[*range(11), *range(8), 0, 0, 0]])
    segments = jnp.array([[1] * 11 + [2] * 8 + [0] * 3])
    ours = forward(Decoder(config, scan_layers=False), params, packed, positions, segments)
    with torch.no_grad():
        alone = [model(torch.tensor(np.array(t))).logits[0].numpy() for t in (first, second)]
    assert relative_error(ours[0, :11], alone[0]) <= TOLERANCE
    assert relative_error(ours[0, 11:19], alone[1]) <= TOLERANCE


def test_prefill_then_decode_with_unequal_rows_equals_full_forward(pair):
    """A padded prompt, two single tokens, then a second prompt over the filled cache."""
    config, _, params = pair
    tokens, lengths = random_tokens(2, 12), np.array([7, 4])
    decoder = Decoder(config, scan_layers=False)
    full = forward(decoder, params, tokens)
    run, cache = step(decoder), init_cache(config, 2, 20)
    bucket = 8
    segments = jnp.array([[1] * n + [0] * (bucket - n) for n in lengths])
    positions = jnp.arange(bucket)[None] + jnp.zeros((2, 1), jnp.int32)
    logits, cache = run(params, tokens[:, :bucket], positions, segments, cache)
    got = [[logits[row, i] for i in range(n)] for row, n in enumerate(lengths)]
    for count in (1, 1, 3):
        at = jnp.array(lengths)[:, None] + jnp.arange(count)[None]
        fed = jnp.take_along_axis(tokens, at, axis=1)
        logits, cache = run(params, fed, at, jnp.ones_like(fed), cache)
        for row in range(2):
            got[row].extend(logits[row])
        lengths = lengths + count
    assert int(cache.end) == bucket + 5
    for row, length in enumerate(lengths):
        assert relative_error(jnp.stack(got[row]), full[row, :length]) <= TOLERANCE


@pytest.mark.parametrize(
    "family, split_experts", [("mistral", False), ("mixtral", False), ("mixtral", True)]
)
def test_scanned_equals_unrolled(family, split_experts):
    config = FAMILIES[family]
    scanned, params = tiny(config)
    unstacked = unstack_layers(params, split_experts=split_experts)
    unrolled = Decoder(config, scan_layers=False, split_experts=split_experts)
    _, expected = tiny(config, scan_layers=False, split_experts=split_experts)
    assert jax.tree.map(jnp.shape, unstacked) == jax.tree.map(jnp.shape, expected)
    np.testing.assert_array_equal(
        unstacked["layer_1"]["attention"]["key"]["kernel"],
        params["layers"]["attention"]["key"]["kernel"][1],
    )
    tokens = random_tokens(2, 9)
    ours = forward(unrolled, unstacked, tokens)
    assert relative_error(ours, forward(scanned, params, tokens)) <= 1e-6


@pytest.mark.parametrize("family", ["mistral", "mixtral"])
def test_gradients_are_finite_and_equal_between_remat_policies(family):
    tokens, grads = random_tokens(2, 9), {}
    for remat in REMAT_POLICIES:
        decoder, params = tiny(FAMILIES[family], remat=remat)

        def loss(params, decoder=decoder):
            logits = jax.nn.log_softmax(forward(decoder, params, tokens))
            return -jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1).mean()

        grads[remat] = jax.jit(jax.grad(loss))(params)
    for leaf in jax.tree.leaves(grads["none"]):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0
    for remat in ("full", "dots"):
        errors = jax.tree.map(relative_error, grads[remat], grads["none"])
        assert max(jax.tree.leaves(errors)) <= 1e-4, remat


def test_gradients_of_every_parameter_equal_transformers(pair):
    config, model, params = pair
    tokens = random_tokens(2, 13)
    batch = torch.tensor(np.array(tokens)).long()
    model.zero_grad()
    model(batch, labels=batch).loss.backward()
    decoder = Decoder(config, scan_layers=False)

    def loss(params):
        logits = jax.nn.log_softmax(forward(decoder, params, tokens))
        return -jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1).mean()

    ours = jax.jit(jax.grad(loss))(params)
    gradients = copy.deepcopy(model)  # whose weights become the gradients, to be renamed as such
    with torch.no_grad():
        for gradient, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
            gradient.copy_(parameter.grad)
    errors = jax.tree.map(relative_error, ours, params_from_hf(gradients, config))
    assert errors.keys() == params.keys()
    for path, error in jax.tree.leaves_with_path(errors):
        assert error <= 1e-4, path


def test_bfloat16_runs_near_float32(pair):
    config, _, params = pair
    tokens = random_tokens(2, 9)
    full = forward(Decoder(config, scan_layers=False), params, tokens)
    low = forward(Decoder(config, dtype=jnp.bfloat16, scan_layers=False), params, tokens)
    assert low.dtype == jnp.float32
    # Top-2 routing may flip for a token under rounding; the bulk may not move.
    assert np.median(np.abs(low - full)) <= 0.02 * np.abs(full).max()


@pytest.mark.parametrize("options", [{}, {"scan_layers": False, "split_experts": True}])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_names_every_axis_once(family, options):
    config = FAMILIES[family]
    decoder = Decoder(config, **options)
    x, zeros = jnp.zeros((1, 4, config.width)), jnp.zeros((1, 4), jnp.int32)
    boxed = jax.eval_shape(lambda: decoder.init(jax.random.key(0), x, zeros, zeros))["params"]
    sizes = {
        "layers": {config.num_layers},
        "expert": {config.num_experts},
        "router": {config.num_experts},
        "embed": {config.width},
        "expert_embed": {config.width},
        "norm": {config.width},
        "mlp": {config.mlp_dim},
        "vocab": {config.vocab_size},
        "heads": {config.num_heads},
        "kv_heads": {config.num_kv_heads},
        "head_dim": {config.head_dim},
    }
    is_box = lambda leaf: isinstance(leaf, meta.AxisMetadata)  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)
    assert leaves
    for path, leaf in leaves:
        assert is_box(leaf), f"{path} has no logical axes"
        assert len(leaf.names) == leaf.value.ndim and len(set(leaf.names)) == len(leaf.names), path
        for name, size in zip(leaf.names, leaf.value.shape, strict=True):
            assert size in sizes[name], (path, leaf.names)


def test_wrong_use_is_one_clear_error():
    decoder, params = tiny()
    x, zeros = jnp.zeros((1, 4, TINY.width)), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="unstack_layers"):
        decoder.apply({"params": params}, x, zeros, zeros, init_cache(TINY, 1, 8))
    with pytest.raises(ValueError, match="unknown remat policy 'dot'"):
        tiny(remat="dot")
    with pytest.raises(ValueError, match="no router logits"):
        decoder.apply({"params": params}, x, zeros, zeros, with_router_logits=True)
    unrolled = Decoder(TINY, scan_layers=False)
    with pytest.raises(ValueError, match="do not fit a cache of 3 slots"):
        unrolled.apply({"params": unstack_layers(params)}, x, zeros, zeros, init_cache(TINY, 1, 3))


@pytest.mark.parametrize("rows", [1, 2])
def test_decode_loop_updates_the_cache_in_place(rows):
    """The compiled loop holds no copy of any layer's keys or values, of one row or several."""
    decoder, params = tiny(scan_layers=False)
    cache = init_cache(TINY, rows, 640)

    def decode(params, token, cache):
        def one(module, token, cache):
            positions = jnp.broadcast_to(cache.end, token.shape)
            hidden, cache = module(module.embed(token), positions, jnp.ones_like(token), cache)
            return module.logits(hidden).argmax(-1).astype(jnp.int32), cache

        def body(state):
            return state[0] + 1, *decoder.apply({"params": params}, *state[1:], method=one)

        return jax.lax.while_loop(lambda state: state[0] < 9, body, (0, token, cache))

    token = jnp.zeros((rows, 1), jnp.int32)
    program = jax.jit(decode, donate_argnums=2).lower(params, token, cache).compile().as_text()
    shape = ",".join(map(str, cache.keys[0].shape))
    updates = re.findall(rf"= f32\[{shape}\]\S* (?:fusion|dynamic-update-slice)\(", program)
    copies = re.findall(rf"= f32\[(?:1,)?{shape}\]\S* copy\(", program)
    assert updates and not copies
