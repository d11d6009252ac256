"""Rules over parameter paths decide what trains."""

import io

import numpy as np
import pytest
from rich.console import Console

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


@pytest.mark.parametrize("arguments", [("(", "train"), (".*", "thaw")])
def test_rule_refuses_what_cannot_be_meant(arguments):
    with pytest.raises(ValueError, match="rule"):
        Rule(*arguments)


def test_partition_and_combine_are_inverse():
    assigned = assign_rules([Rule("vision/.*", "freeze"), Rule(".*", "train")], PARAMS)
    trainable, frozen = partition(PARAMS, assigned)
    assert set(frozen) == {"vision/fc1/kernel", "vision/fc1/bias"}
    again = combine(trainable, frozen)
    assert again["vision"]["fc1"]["kernel"] is PARAMS["vision"]["fc1"]["kernel"]
    assert again["decoder"]["lm_head"]["kernel"] is PARAMS["decoder"]["lm_head"]["kernel"]


def test_table_counts_parameters():
    assigned = assign_rules([Rule("vision/.*", "freeze"), Rule(".*", "train", 2.0)], PARAMS)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(parameter_table(PARAMS, assigned))
    rows = [line.split("│")[1:-1] for line in console.export_text().splitlines() if "│" in line]
    rows = [[cell.strip() for cell in row] for row in rows]
    assert ["vision/.*", "vision", "freeze", "-", "2", "9"] in rows
    assert [".*", "connector", "train", "2", "1", "15"] in rows
    assert ["all", "", "train", "", "2", "50"] in rows
    assert ["all", "", "freeze", "", "2", "9"] in rows
