"""Rules over parameter paths decide what trains."""

import io

import jax
import numpy as np
import pytest
from rich.console import Console

from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.train.lora import adapt
from vllama2_jax.train.trainable import (
    Rule,
    assign_rules,
    combine,
    parameter_table,
    partition,
)

PARAMS = {
    "vision": {"fc1": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}},
    "connector": {"readout_0": {"kernel": np.ones((3, 5))}},
    "decoder": {"lm_head": {"kernel": np.ones((5, 7))}},
}


def test_first_matching_rule_wins():
    assigned = assign_rules(
        [Rule(".*/bias", "freeze"), Rule("vision/.*", "train", 0.1), Rule(".*", "train")], PARAMS
    )
    assert assigned["vision/fc1/bias"].action == "freeze"
    assert assigned["vision/fc1/kernel"].lr_scale == 0.1
    assert assigned["decoder/lm_head/kernel"].lr_scale == 1.0
    assert len(assigned) == 4


def test_rules_match_whole_paths():
    with pytest.raises(ValueError, match="vision/fc1/kernel"):
        assign_rules([Rule("vision", "train"), Rule("connector/.*|decoder/.*", "train")], PARAMS)


def test_unmatched_parameters_are_one_error_that_names_them_all():
    with pytest.raises(ValueError) as caught:
        assign_rules([Rule("vision/.*", "freeze")], PARAMS)
    message = str(caught.value)
    assert "connector/readout_0/kernel" in message and "decoder/lm_head/kernel" in message
    assert "vision" not in message and "\n" not in message


def test_rule_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="conector"):
        assign_rules([Rule("conector/.*", "train"), Rule(".*", "freeze")], PARAMS)


@pytest.mark.parametrize(
    "arguments, why",
    [
        (dict(pattern="(", action="train"), "not a regular expression"),
        (dict(action="thaw"), "unknown action 'thaw'; known: train, freeze, lora"),
        (dict(action="train", rank=8), "belong to the action 'lora', not to 'train'"),
        (dict(action="freeze", quantize="nf4"), "belong to the action 'lora', not to 'freeze'"),
        (dict(action="lora", rank=0, alpha=1.0), "rank of at least 1 .* not rank 0 and alpha 1"),
        (dict(action="lora", rank=8), "an alpha above 0, not rank 8 and alpha 0"),
        (dict(action="lora", rank=8, alpha=16, quantize="fp4"), "unknown quantize 'fp4'"),
    ],
)
def test_rule_refuses_what_cannot_be_meant(arguments, why):
    with pytest.raises(ValueError, match=f"^rule .*{why}"):
        Rule(**{"pattern": ".*", **arguments})


def test_lora_rule_on_what_is_no_kernel_of_the_decoder_is_an_error_that_names_it():
    lora = Rule("vision/.*|decoder/.*", "lora", rank=2, alpha=4)
    with pytest.raises(ValueError) as caught:
        assign_rules([lora, Rule(".*", "freeze")], PARAMS)
    message = str(caught.value)
    assert "vision/fc1/kernel" in message and "vision/fc1/bias" in message
    assert "lm_head" not in message and "\n" not in message


def test_partition_and_combine_are_inverse():
    assigned = assign_rules([Rule("vision/.*", "freeze"), Rule(".*", "train")], PARAMS)
    trainable, frozen = partition(PARAMS, assigned)
    assert set(frozen) == {"vision/fc1/kernel", "vision/fc1/bias"}
    again = combine(trainable, frozen)
    assert again["vision"]["fc1"]["kernel"] is PARAMS["vision"]["fc1"]["kernel"]
    assert again["decoder"]["lm_head"]["kernel"] is PARAMS["decoder"]["lm_head"]["kernel"]


def table_rows(params, assigned):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(parameter_table(params, assigned))
    rows = [line.split("│")[1:-1] for line in console.export_text().splitlines() if "│" in line]
    return [[cell.strip() for cell in row] for row in rows]


def test_table_counts_parameters():
    assigned = assign_rules([Rule("vision/.*", "freeze"), Rule(".*", "train", 2.0)], PARAMS)
    rows = table_rows(PARAMS, assigned)
    assert ["vision/.*", "vision", "freeze", "-", "2", "9"] in rows
    assert [".*", "connector", "train", "2", "1", "15"] in rows
    assert ["all", "", "train", "", "2", "50"] in rows
    assert ["all", "", "freeze", "", "2", "9"] in rows


@pytest.mark.parametrize("kind", ["", "int8", "nf4"])
def test_adapters_go_by_the_rule_of_their_kernel_and_the_table_counts_both(kind):
    params = {**PARAMS, "decoder": {"lm_head": {"kernel": np.ones((64, 7), np.float32)}}}
    lora = Rule("decoder/.*", "lora", 3.0, rank=2, alpha=4, quantize=kind)
    rules = [Rule("connector/.*", "train"), lora, Rule(".*", "freeze")]
    adapted = adapt(params, rules, jax.random.key(0))
    assigned = assign_rules(rules, adapted)
    assert all((rule is lora) == path.startswith("decoder/") for path, rule in assigned.items())
    trainable, frozen = partition(adapted, assigned)
    adapters = {f"decoder/lm_head/kernel_lora_{part}" for part in "ab"}
    assert set(trainable) == {"connector/readout_0/kernel", *adapters}
    again = flatten(combine(trainable, frozen))
    assert all(again[path] is leaf for path, leaf in flatten(adapted).items())
    rows = table_rows(adapted, assigned)
    assert ["decoder/.*", "decoder", "train, rank 2, alpha 4", "3", "2", "142"] in rows
    frozen_kernel = f"freeze, {kind}" if kind else "freeze"
    assert ["decoder/.*", "decoder", frozen_kernel, "-", "1", "448"] in rows
    assert ["all", "", "train", "", "3", "157"] in rows
    assert ["all", "", "freeze", "", "3", "457"] in rows
