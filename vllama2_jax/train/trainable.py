"""Which parameters train: ordered rules over parameter paths.

A training stage is such a list, not a branch in the code:

    RULES = (Rule("vision/.*", "freeze"), Rule("connector/.*", "train", lr_scale=10.0),
             Rule(".*", "train"))

A kernel under a `lora` rule is frozen, and adapters beside it train (`lora.py` makes them).
"""

import dataclasses
import re

import numpy as np
from rich.table import Table

from vllama2_jax.checkpoints.store import flatten, unflatten
from vllama2_jax.models.lora import LORA_A, LORA_B, kernel_axes, kernel_path
from vllama2_jax.models.quantized import STORED_AS

ACTIONS = ("train", "freeze", "lora")


@dataclasses.dataclass(frozen=True)
class Rule:
    """What happens to the parameters whose whole path (`connector/readout_0/kernel`) matches.

    Attributes:
      pattern: a regular expression.
      action: "train", "freeze", or "lora", for kernels of the decoder's linear layers and experts.
      lr_scale: times the schedule's learning rate, for what trains.
      rank: of lora, the inner size of the adapters.
      alpha: of lora; alpha / rank scales what the adapters add.
      quantize: of lora, how the frozen kernel is stored: "" as it is, "int8" or "nf4".
    """

    pattern: str
    action: str
    lr_scale: float = 1.0
    rank: int = 0
    alpha: float = 0.0
    quantize: str = ""

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
        if self.action != "lora":
            if self.rank or self.alpha or self.quantize:
                raise ValueError(
                    f"rule {self.pattern!r}: rank, alpha and quantize belong to the action 'lora', "
                    f"not to {self.action!r}"
                )
            return
        if self.rank < 1 or self.alpha <= 0:
            raise ValueError(
                f"rule {self.pattern!r}: lora needs a rank of at least 1 and an alpha above 0, not "
                f"rank {self.rank} and alpha {self.alpha:g}"
            )
        if self.quantize and self.quantize not in STORED_AS:
            raise ValueError(
                f"rule {self.pattern!r}: unknown quantize {self.quantize!r}; "
                f"known: {', '.join(STORED_AS)}, or '' for none"
            )


def assign_rules(rules, params) -> dict[str, Rule]:
    """The first matching rule of every parameter, {path: rule}.

    Adapters and the parts of a quantised kernel go by the kernel's path: parameters have the same
    rules before `lora.adapt` and behind it.

    Args:
      rules: in order of precedence.
      params: nested dict of arrays or anything with a shape.

    Raises:
      ValueError: listing the parameters that no rule matches, the rules that match nothing, or what
        a lora rule cannot adapt.
    """
    assigned, unmatched = {}, []
    for path in flatten(params):
        rule = next((r for r in rules if re.fullmatch(r.pattern, kernel_path(path))), None)
        if rule is None:
            unmatched.append(path)
        else:
            assigned[path] = rule
    if unmatched:
        raise ValueError(
            f"no rule says whether these parameters train: {', '.join(unmatched)}"
            '; add a rule, for example Rule(".*", "freeze") at the end'
        )
    kernels = {kernel_path(path) for path in assigned}
    idle = [r.pattern for r in rules if not any(re.fullmatch(r.pattern, p) for p in kernels)]
    if idle:
        raise ValueError(f"these rules match no parameter (a typo?): {', '.join(idle)}")
    for rule in {rule: None for rule in assigned.values() if rule.action == "lora"}:
        ours = {kernel_path(path) for path, other in assigned.items() if other == rule}
        unfit = sorted(path for path in ours if kernel_axes(path) is None)
        if unfit:
            raise ValueError(
                f"rule {rule.pattern!r}: lora adapts kernels of the decoder's linear layers and "
                f"experts, not {', '.join(unfit)}; narrow its pattern"
            )
    return assigned


def trains(path: str, rule: Rule) -> bool:
    """Whether a parameter trains under its rule; under lora, only adapters do."""
    return rule.action == "train" or (rule.action == "lora" and path.endswith((LORA_A, LORA_B)))


def partition(params, assigned: dict[str, Rule]) -> tuple[dict, dict]:
    """Split parameters into flat dicts {path: array} of what trains and what is frozen.

    Raises:
      ValueError: if a lora rule's kernels have no adapters.
    """
    flat = flatten(params)
    bare = [
        path
        for path, rule in assigned.items()
        if rule.action == "lora" and kernel_path(path) + LORA_A not in flat
    ]
    if bare:
        raise ValueError(
            f"these parameters have a lora rule and no adapters: {', '.join(bare)}; "
            "call lora.adapt first"
        )
    trainable = {path: leaf for path, leaf in flat.items() if trains(path, assigned[path])}
    return trainable, {p: leaf for p, leaf in flat.items() if p not in trainable}


def combine(trainable: dict, frozen: dict) -> dict:
    """The inverse of `partition`: a nested dict of all parameters."""
    return unflatten({**frozen, **trainable})


def parameter_table(params, assigned: dict[str, Rule]) -> Table:
    """Counts per rule and part of the network, to be printed in front of a run.

    A lora rule has a line for its kernels and one for its adapters. Counted are the network's
    parameters and the adapters, not the constants by which quantised kernels and adapters scale.
    """
    counts: dict[tuple[Rule, str, str], list[int]] = {}
    for path, leaf in flatten(params).items():
        rule, size = assigned[path], _num_parameters(path, leaf)
        if size is None:
            continue
        row = counts.setdefault((rule, path.split("/", 1)[0], _action(path, rule)), [0, 0])
        row[0] += 1
        row[1] += size
    table = Table(title="Parameters")
    for name in ("rule", "part", "action", "lr scale"):
        table.add_column(name)
    table.add_column("tensors", justify="right")
    table.add_column("parameters", justify="right")
    for (rule, part, action), (tensors, size) in counts.items():
        scale = "-" if action.startswith("freeze") else f"{rule.lr_scale:g}"
        table.add_row(rule.pattern, part, action, scale, f"{tensors:,}", f"{size:,}")
    for total in ("train", "freeze"):
        sizes = [row for (*_, action), row in counts.items() if action.startswith(total)]
        table.add_row(
            "all",
            "",
            total,
            "",
            *(f"{sum(column):,}" for column in zip((0, 0), *sizes)),  # noqa: B905
        )
    return table


def _action(path: str, rule: Rule) -> str:
    """What a line of the table says of a parameter."""
    if rule.action != "lora":
        return rule.action
    if trains(path, rule):
        return f"train, rank {rule.rank}, alpha {rule.alpha:g}"
    return f"freeze, {rule.quantize}" if rule.quantize else "freeze"


def _num_parameters(path: str, leaf) -> int | None:
    """How many parameters a leaf stands for; None for constants beside a kernel."""
    size, part = int(np.prod(leaf.shape)), path.removeprefix(kernel_path(path))
    counted = {"": size, LORA_A: size, LORA_B: size, "_int8": size, "_nf4": 2 * size}
    return counted.get(part)
