"""Plans of answering: what reading prompts takes, and what a new token does."""

import json

import jax
import pytest

from vllama2_jax.cli import main
from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.models.zoo import model_config
from vllama2_jax.parallel.mesh import abstract_layout, parse_mesh
from vllama2_jax.parallel.topology import topology
from vllama2_jax.plan.serving import PROGRAMS, plan_serving, serving_of
from vllama2_jax.plan.serving_estimate import estimate_serving
from vllama2_jax.plan.serving_work import serving_flops

ROWS, NEW = 4, 300
TINY = model_config("tiny")
# As `result.Plan` has them, so that scripts read both alike.
KEYS = {"fits", "chips", "compile_seconds", "hbm_bytes_per_chip", "model_flops_per_step"}
KEYS |= {"hardware_flops_per_step", "collectives", "hlo", "roofline", "stage"}


@pytest.fixture(scope="module")
def plans(libtpu):
    """{program: plan} of `tiny` over four chips."""
    mesh, slice_ = parse_mesh("2d:fsdp=2,tensor=2"), topology("v5e:2x2")
    return {
        program: plan_serving(TINY, serving_of(TINY, program, ROWS, None, NEW), mesh, slice_)
        for program in PROGRAMS
    }


def kernel_params(c) -> int:
    """Parameters that every token of a dense decoder is multiplied with, without its head."""
    attention = c.width * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    return c.num_layers * (attention + 3 * c.width * c.mlp_dim)


def test_a_new_token_takes_two_operations_per_parameter_and_looks_at_the_cache(plans):
    c, plan = TINY.decoder, plans["decode"]
    seen = 4 * c.num_layers * c.num_heads * c.head_dim * plan.serving.capacity
    kernels = kernel_params(c) + c.width * c.vocab_size
    assert plan.serving.room == 512  # as inference makes it, in steps
    assert plan.flops.model == plan.flops.hardware == ROWS * (2 * kernels + seen)


def test_a_prompt_needs_logits_of_its_last_slot_alone(plans):
    c, plan = TINY.decoder, plans["prefill"]
    length = plan.serving.length
    seen = 2 * c.num_layers * c.num_heads * c.head_dim * length**2  # half of the square
    head = 2 * c.width * c.vocab_size
    assert plan.flops.model == ROWS * (2 * kernel_params(c) * length + seen + head)


def cache_bytes(c, slots: int) -> int:
    """Keys and values of all rows, in bfloat16."""
    return 2 * 2 * c.num_layers * ROWS * c.num_kv_heads * c.head_dim * slots


def weight_bytes(c) -> int:
    """Of the decoder's kernels, without its embedding."""
    return 2 * (kernel_params(c) + c.width * c.vocab_size)


def test_a_chip_holds_its_share_of_the_cache_and_at_least_of_all_weights(plans):
    c = TINY.decoder
    everything = 2 * sum(leaf.size for leaf in jax.tree.leaves(abstract_params(TINY)))
    for plan in plans.values():
        whole = cache_bytes(c, plan.serving.capacity)
        # By heads, over the two chips of `tensor`.
        assert plan.cache == (whole / 2, whole)
        weights = plan.memory.arguments - plan.cache[0]
        assert everything / 4 < weights < everything
        assert plan.fits and plan.memory.peak < plan.memory.limit


def test_no_weights_are_gathered_where_a_token_is_decoded_in_two_dimensions(plans):
    plan = plans["decode"]
    kinds = {one.kind for one in plan.sent.collectives}
    assert "all-reduce" in kinds
    kernel = 2 * TINY.decoder.width * TINY.decoder.mlp_dim / 4
    gathers = [one.bytes for one in plan.sent.collectives if one.kind == "all-gather"]
    assert all(size < kernel / 10 for size in gathers)


def test_a_token_takes_as_long_as_its_weights_and_cache_take_to_read(plans):
    plan = plans["decode"]
    roof = plan.roofline
    read = weight_bytes(TINY.decoder) / 4 + plan.cache[0]
    # Norms and biases, and a few numbers that are gathered, beside.
    assert roof.hbm_seconds * 810e9 == pytest.approx(read, rel=0.01)
    assert roof.step_seconds == pytest.approx(roof.hbm_seconds + roof.exposed_seconds)
    assert plan.tokens_per_second == pytest.approx(ROWS / roof.step_seconds)


def test_few_tokens_meet_every_chosen_expert():
    """Two rows choose up to four of eight experts, and each runs for both."""
    network = model_config("2-8x7B")
    layout = abstract_layout(parse_mesh("2d:tensor=8,fsdp=1"), 8)
    found = serving_flops(network, serving_of(network, "decode", 2, 64, 8), layout)
    c = network.decoder
    experts = 2 * c.num_layers * 3 * c.width * c.mlp_dim  # of one expert, a token
    assert found.hardware - found.model == 2 * experts * (4 - c.top_k)


@pytest.mark.parametrize("program", PROGRAMS)
def test_formulas_come_near_a_compiled_program(plans, program):
    compiled = plans[program]
    mesh = parse_mesh("2d:fsdp=2,tensor=2")
    found = estimate_serving(TINY, compiled.serving, mesh, compiled.topology)
    assert found.estimated and found.compile_seconds is None
    assert found.memory.arguments == pytest.approx(compiled.memory.arguments, rel=0.15)  # padded
    assert found.memory.peak == pytest.approx(compiled.memory.peak, rel=0.4)
    assert found.roofline.hbm_seconds == pytest.approx(compiled.roofline.hbm_seconds, rel=0.02)
    # The compiler adds what is read of the embedding, norms and the like.
    assert 0.4 < found.wire_bytes / compiled.wire_bytes <= 1.1


def test_without_such_gpus_formulas_answer_and_say_so(capsys):
    arguments = ["plan", "--of", "decode", "--model", "2-7B", "--topology", "h100:2"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["estimated"] is True and found["compile_seconds"] is None
    # Every weight of the decoder but its embedding, and the cache, once per token.
    c = model_config("2-7B").decoder
    cache = 2 * 2 * c.num_layers * 8 * c.num_kv_heads * c.head_dim * (1024 + 256)
    read = (weight_bytes(c) + cache) / 2
    assert found["roofline"]["hbm_seconds"] == pytest.approx(read / 3.35e12, rel=0.01)
    assert main(arguments) == 0
    assert "estimated by formulas" in " ".join(capsys.readouterr().out.split())


def test_json_of_an_answer_has_the_keys_of_a_step(libtpu, capsys, tmp_path):
    hlo = tmp_path / "decode.txt"
    arguments = ["plan", "--of", "decode", "--model", "tiny", "--topology", "v5e:2x2"]
    arguments += ["--batch", "2", "--json"]
    assert main([*arguments, "--save-hlo", str(hlo)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found) >= KEYS and found["program"] == "decode" and found["chips"] == 4
    # Two heads of keys cannot be shared by four chips.
    assert found["mesh"]["tensor"] == 2 and found["mesh"]["fsdp"] == 2
    assert found["batch"]["rows"] == 2 and hlo.read_text().startswith("HloModule")
    assert main(arguments[:-1]) == 0
    assert "tokens/s of answers, by a model" in " ".join(capsys.readouterr().out.split())


def test_what_does_not_fit_ends_with_1(libtpu, capsys):
    arguments = ["plan", "--of", "prefill", "--model", "2-7B", "--topology", "v5e:1x1", "--json"]
    assert main([*arguments, "--batch", "16"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False and "exceed" in found["refusal"].lower()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--of", "decode", "--data", "x.json"), "--data is of training"),
        (("--of", "decode", "--search"), "--search is of training"),
        (("--of", "decode", "--model", ""), "--of decode needs --model"),
        (("--of", "decode", "--batch", "0"), "--batch 0 must be at least 1"),
        (("--new", "8"), "--new is of answers"),
        (("--of", "decode", "--mesh", "fsdp+tensor:tensor=3,fsdp=1"), "does not fit 4"),
    ],
)
def test_what_cannot_be_meant_is_one_line(libtpu, capsys, arguments, words):
    assert main(["plan", "--topology", "v5e:2x2", "--model", "tiny", *arguments]) != 0
    said = capsys.readouterr().err
    assert words in said and "Traceback" not in said
