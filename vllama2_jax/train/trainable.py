"""Which parameters train: ordered rules over parameter paths.

A training stage is such a list, not a branch in the code:

    RULES = (Rule("vision/.*", "freeze"), Rule("connector/.*", "train", lr_scale=10.0),
             Rule(".*", "train"))
"""

import dataclasses
import re

import numpy as np
from rich.table import Table

from vllama2_jax.checkpoints.store import flatten, unflatten

ACTIONS = ("train", "freeze")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What happens to the parameters whose whole path (`connector/readout_0/kernel`) matches.

    Attributes:
      pattern: a regular expression.
      action: "train" or "freeze".
      lr_scale: times the schedule's learning rate, for what trains.
    """

    pattern: str
    action: str
    lr_scale: float = 1.0

    def __post_init__(self):
        """Refuse what cannot be meant."""
        if self.action not in ACTIONS:
            raise ValueError(
                f"rule {self.pattern!r}: unknown action {self.action!r}; "
                f"known: {', '.join(ACTIONS)}"
            )
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"rule {self.pattern!r}: not a regular expression ({error})") from None


def assign_rules(rules, params) -> dict[str, Rule]:
    """The first matching rule of every parameter, {path: rule}.

    Args:
      rules: in order of precedence.
      params: nested dict of arrays or anything with a shape.

    Raises:
      ValueError: listing the parameters that no rule matches, or the rules that match nothing.
    """
    assigned, unmatched = {}, []
    for path in flatten(params):
        rule = next((r for r in rules if re.fullmatch(r.pattern, path)), None)
        if rule is None:
            unmatched.append(path)
        else:
            assigned[path] = rule
    if unmatched:
        raise ValueError(
            f"no rule says whether these parameters train: {', '.join(unmatched)}"
            '; add a rule, for example Rule(".*", "freeze") at the end'
        )
    idle = [r.pattern for r in rules if not any(re.fullmatch(r.pattern, p) for p in assigned)]
    if idle:
        raise ValueError(f"these rules match no parameter (a typo?): {', '.join(idle)}")
    return assigned


def partition(params, assigned: dict[str, Rule]) -> tuple[dict, dict]:
    """Split parameters into flat dicts {path: array} of what trains and what is frozen."""
    flat = flatten(params)
    trainable = {p: leaf for p, leaf in flat.items() if assigned[p].action == "train"}
    return trainable, {p: leaf for p, leaf in flat.items() if p not in trainable}


def combine(trainable: dict, frozen: dict) -> dict:
    """The inverse of `partition`: a nested dict of all parameters."""
    return unflatten({**frozen, **trainable})


def parameter_table(params, assigned: dict[str, Rule]) -> Table:
    """Counts per rule and part of the network, to be printed in front of a run."""
    counts: dict[tuple[Rule, str], list[int]] = {}
    for path, leaf in flatten(params).items():
        row = counts.setdefault((assigned[path], path.split("/", 1)[0]), [0, 0])
        row[0] += 1
        row[1] += int(np.prod(leaf.shape))
    table = Table(title="Parameters")
    for name in ("rule", "part", "action", "lr scale"):
        table.add_column(name)
    table.add_column("tensors", justify="right")
    table.add_column("parameters", justify="right")
    for (rule, part), (tensors, size) in counts.items():
        scale = f"{rule.lr_scale:g}" if rule.action == "train" else "-"
        table.add_row(rule.pattern, part, rule.action, scale, f"{tensors:,}", f"{size:,}")
    for action in ACTIONS:
        sizes = [row for (rule, _), row in counts.items() if rule.action == action]
        table.add_row(
            "all",
            "",
            action,
            "",
            *(f"{sum(column):,}" for column in zip((0, 0), *sizes)),  # noqa: B905
        )
    return table
