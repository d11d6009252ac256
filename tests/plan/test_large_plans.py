"""What the compiled steps of the 8x7B models hold, and what they must not exceed."""

import pytest

from tests.plan.conftest import config_of, gathered_weights
from vllama2_jax.parallel.topology import topology
from vllama2_jax.plan.estimate import estimate
from vllama2_jax.plan.planning import plan
from vllama2_jax.plan.program import Shape

V5P_128 = topology("v5p-128")
GB = 1e9
# Mixtral 8x7B, in numbers of its config.json: attention, router, experts, two norms.
_EXPERTS = 8 * 3 * 4096 * 14336
LAYER = 4096 * 128 * (32 + 8 + 8 + 32) + 4096 * 8 + _EXPERTS + 2 * 4096
MIXTRAL = 32 * LAYER + 2 * 4096 * 32000 + 4096
VOCAB = 32000


@pytest.fixture(scope="module")
def decoder_only(libtpu, tmp_path_factory):
    hlo = tmp_path_factory.mktemp("hlo") / "step.txt"
    return plan(config_of("decoder_only"), V5P_128, save_hlo=hlo), hlo.read_text()


def test_arguments_of_the_decoder_are_weights_and_two_moments_in_bfloat16(decoder_only):
    found, _ = decoder_only
    batch = 128 * 2048 * 7 * 4 / 64  # six arrays of whole numbers and the weights of targets
    expected = (MIXTRAL * 2 * 3) / 64 + batch
    assert found.memory.arguments == pytest.approx(expected, rel=0.005)


def test_the_decoder_needs_less_memory_and_sends_less_than_maxtext(decoder_only):
    found, _ = decoder_only
    assert found.memory.peak <= 13.3 * GB
    assert found.wire_bytes <= 280 * GB
    # Every kernel is gathered twice and its gradient scattered: nothing is left out of the count.
    assert found.wire_bytes >= 63 / 64 * 3 * 2 * 32 * LAYER


def test_gradients_of_the_decoder_are_scattered_and_never_summed_whole(decoder_only):
    found, _ = decoder_only
    sent = {c["kind"]: c["wire_bytes"] for c in found.to_json()["collectives"]}
    assert sent["all-reduce"] <= 0.05 * GB
    assert sent["reduce-scatter"] >= 63 / 64 * 2 * 32 * LAYER


def test_no_gather_of_the_decoder_brings_more_than_a_layer(decoder_only):
    found, text = decoder_only
    gathers = gathered_weights(text, VOCAB)
    assert max(gathers) <= 2 * LAYER
    assert max(gathers) >= 2 * _EXPERTS / 3  # experts are among them
    assert max(gathers) == found.to_json()["largest_gather"]["bytes"]


def test_the_program_calls_the_kernels_of_tpus_once_a_product(decoder_only):
    found, text = decoder_only
    assert "jit(gmm)" in text and "splash_mha" in text
    # Per layer: two products in, one out; the first two again; three gradients of tokens; three of
    # weights.
    assert found.sent.kernels["gmm"] == 32 * (3 + 2 + 3)
    assert found.sent.kernels["tgmm"] == 32 * 3
    assert found.sent.kernels["splash_mha_dkv_segmented_no_residuals"] == 32


def test_formulas_alone_come_near_the_compiled_program(decoder_only):
    found, _ = decoder_only
    guess = estimate(config_of("decoder_only"), V5P_128)
    assert guess.estimated and not found.estimated
    assert guess.wire_bytes == pytest.approx(found.wire_bytes, rel=0.02)
    assert guess.memory.arguments == pytest.approx(found.memory.arguments, rel=0.03)
    assert found.memory.peak <= guess.memory.peak <= 1.4 * found.memory.peak


@pytest.mark.slow
def test_the_8x7b_step_fits_v5p_128_with_room_and_is_worth_its_chips(libtpu, tmp_path):
    hlo = tmp_path / "step.txt"
    found = plan(config_of("video_sft", model="2-8x7B"), V5P_128, save_hlo=hlo)
    assert found.shape == Shape(rows=128, length=2944, frames=8, clips=1, sounds=0)
    assert found.memory.peak <= 0.9 * found.memory.limit
    assert found.flops.hardware <= 1.35 * found.flops.model
    assert max(gathered_weights(hlo.read_text(), VOCAB)) <= 2 * LAYER
    assert found.roofline.utilisation >= 0.6
