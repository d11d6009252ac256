"""Plans by formulas alone, and what is tried when one is searched for."""

import dataclasses

import pytest

from tests.plan.conftest import config_of
from vllama2_jax.models.zoo import model_config
from vllama2_jax.parallel.mesh import MeshConfig, abstract_layout
from vllama2_jax.parallel.topology import topology
from vllama2_jax.plan import search as searching
from vllama2_jax.plan.estimate import estimate
from vllama2_jax.plan.result import Memory
from vllama2_jax.plan.search import candidates, mesh_and_batch, search
from vllama2_jax.plan.stage import stage_of
from vllama2_jax.plan.work import chip_flops, shares
from vllama2_jax.train.flops import StepFlops

# Mistral 7B and the connector, in numbers of their configurations; the tower is CLIP ViT-L/14-336,
# of which the last of 24 blocks and the last norm do not run.
_MISTRAL = 32 * (4096 * 128 * (32 + 8 + 8 + 32) + 3 * 4096 * 14336 + 2 * 4096)
MISTRAL_7B = model_config("2-7B")
MISTRAL = _MISTRAL + 2 * 32000 * 4096 + 4096


def test_without_a_gpu_arguments_are_masters_and_moments_of_what_trains_and_little_else():
    found = estimate(config_of("video_sft"), topology("h100:8"))
    # What trains has a float32 master and two moments; the frozen tower (0.3e9) is bfloat16.
    least = MISTRAL * 12 / 8
    assert found.estimated and found.compile_seconds is None
    assert least <= found.memory.arguments <= 1.15 * least
    assert found.fits and found.mesh["fsdp"] == 8


def test_more_rows_and_fewer_chips_need_more_memory():
    def peak(name, **shortcuts):
        return estimate(config_of("video_sft", **shortcuts), topology(name)).memory.peak

    assert peak("h100:8", batch=256) > peak("h100:8") > peak("h100:8x2")
    assert not estimate(config_of("video_sft"), topology("h100:2")).fits


def test_tensor_parallelism_sends_sums_of_activations():
    config = config_of("video_sft", mesh="fsdp+tensor:tensor=4,fsdp=-1")
    found = estimate(config, topology("h100:8"))
    slots = 128 / 2 * found.shape.length
    # Two behind attention and MLP, two in front of them on the way back, one computed again.
    expected = 5 * 32 * slots * 4096 * 2
    sums = [c for c in found.sent.collectives if c.axes == ("tensor",)]
    assert sum(c.bytes * c.count for c in sums) == pytest.approx(expected)


def gathered(plan, *axes) -> float:
    sent = [one for one in plan.sent.collectives if one.kind == "all-gather" and one.axes == axes]
    return sum(one.bytes * one.count for one in sent)


def test_experts_stay_where_they_lie_under_expert_parallelism():
    config = config_of("decoder_only", mesh="fsdp+expert:expert=4,fsdp=16")
    found = estimate(config, topology("v5p:4x4x4"))
    # Two of the eight experts, for the forward and the backward pass, in bfloat16.
    experts = 2 * 32 * 3 * 2 * 4096 * 14336 * 2
    assert gathered(found, "fsdp") == pytest.approx(experts)
    assert found.wire_bytes < estimate(config_of("decoder_only"), topology("v5p:4x4x4")).wire_bytes


def test_layers_are_gathered_one_by_one():
    found = estimate(config_of("video_sft", model="2-8x7B"), topology("v5p:4x4x4"))
    largest = found.to_json()["largest_gather"]
    assert largest == {"bytes": 8 * 4096 * 14336 * 2, "shape": "bfloat16[8,14336,4096]"}


def test_what_every_chip_does_for_itself_takes_its_time_on_all_of_them():
    # 128 clips on 256 chips that share rows two by two: each connector runs twice.
    layout = abstract_layout(MeshConfig(sequence=2), 256)
    divided = shares(layout, rows=128, frames=8, clips=1)
    assert divided["connector"] == 128 and divided["vision"] == divided["decoder"] == 256
    flops = StepFlops(1, {"connector": 512, "decoder": 1024})
    assert chip_flops(flops, divided) == 512 / 128 + 1024 / 256


def test_micro_batches_read_weights_anew():
    config = config_of("decoder_only")

    def moved(parts):
        changed = dataclasses.replace(config, micro_batches=parts)
        return estimate(changed, topology("v5p:4x4x4")).roofline.hbm_seconds * 2.8e12

    # Three passes read them and one writes and reads their gradients, and the two passes over
    # layers write what they gather; bfloat16.
    assert moved(2) - moved(1) == pytest.approx(2 * 46.7e9 * (3 + 2 + 2), rel=0.01)


def test_what_is_kept_for_the_backward_pass_moves_also_where_the_decoder_is_frozen():
    config = config_of("video_pretrain")
    few, many = (
        estimate(dataclasses.replace(config, rows=rows), topology("h100:8")) for rows in (256, 512)
    )
    slots = 256 / 8 * few.shape.length
    moved = (many.roofline.hbm_seconds - few.roofline.hbm_seconds) * 3.35e12
    assert moved == pytest.approx(2 * slots * 32 * 4096 * 2)


def test_products_of_float32_take_their_own_peak():
    config = config_of("video_sft")
    narrow = estimate(config, topology("h100:8")).roofline.compute_seconds
    wide = estimate(dataclasses.replace(config, dtype="float32"), topology("h100:8"))
    assert wide.roofline.compute_seconds == pytest.approx(989.5 / 494.5 * narrow)
    assert any("494.5 TFLOP/s (float32)" in sentence for sentence in wide.assumptions)


def test_the_stage_is_the_papers_samples():
    config = config_of("video_sft")
    assert stage_of(config) == (1_234_000, 9_641)
    assert stage_of(dataclasses.replace(config, steps=10, epochs=None)) == (1280, 10)


def test_candidates_split_what_can_be_split():
    config = config_of("video_sft", model="2-8x7B")
    tried = list(candidates(config, model_config("2-8x7B"), 64, (256,)))
    meshes = {candidate.mesh for candidate in tried}
    assert MeshConfig() in meshes
    assert MeshConfig(layout="fsdp+expert", expert=8) in meshes
    assert MeshConfig(layout="fsdp+tensor", tensor=8) in meshes
    for candidate in tried:
        parts = 64 // candidate.mesh.tensor // candidate.mesh.sequence
        assert candidate.rows in (128, 256)
        assert candidate.rows % (parts * candidate.micro_batches) == 0
    without = candidates(config, MISTRAL_7B, 64)
    assert all(candidate.mesh.expert == 1 for candidate in without)


def test_chips_that_do_not_divide_the_width_hold_copies():
    config = config_of("video_sft", batch=192)
    first = next(candidates(config, MISTRAL_7B, 192)).mesh
    assert first.sizes(192) == {"data": 3, "fsdp": 64, "expert": 1, "sequence": 1, "tensor": 1}
    best = search(config, topology("v5p:4x4x12"), most=0)[0]
    assert best.fits and best.mesh["data"] == 3


def test_the_fastest_that_fit_are_compiled_one_of_a_mesh_and_ranked_by_what_was_found(monkeypatch):
    asked = []

    def compiled(config, topology, length, records):
        asked.append(config)
        guess = estimate(config, topology, length=length)
        crowded = config.mesh == MeshConfig() and config.micro_batches == 1
        memory = Memory(1, topology.chip.hbm_bytes if crowded else 1, topology.chip.hbm_bytes)
        return dataclasses.replace(guess, memory=memory, estimated=False)

    monkeypatch.setattr(searching, "plan", compiled)
    found = search(config_of("video_sft"), topology("v5p:2x2x4"), most=2)
    assert found[0].fits and not found[-1].fits
    fitting = [plan for plan in found if plan.fits]
    assert len({plan.config.mesh for plan in fitting}) == len(fitting) == 2
    speeds = [plan.samples_per_second for plan in fitting]
    assert speeds == sorted(speeds, reverse=True)
    assert asked[0].micro_batches == 1 and asked[1].mesh == MeshConfig()
    assert mesh_and_batch(found[0]).startswith("fsdp 16; 128 rows in 2 micro-batches")


def test_where_no_mesh_fits_one_line_says_why():
    with pytest.raises(
        ValueError, match=r"no mesh fits h100:8x4: 3 rows divide over none; change --batch"
    ):
        search(config_of("video_sft", batch=3), topology("h100:8x4"))
