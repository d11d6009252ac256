"""Plans of the tests, and a reading of compiled programs that shares nothing with the package's."""

import math
import re

from vllama2_jax.configs.parse import build
from vllama2_jax.configs.shortcuts import Shortcuts, resolve

_SHAPE = re.compile(r"(pred|[su]8|bf16|f16|[suf]32|[suf]64)\[([\d,]*)\]")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2}


def config_of(recipe: str, **shortcuts):
    """A recipe as the command line would change it."""
    return build(resolve([f"config:{recipe}"], Shortcuts(**shortcuts)))


def gathered_weights(text: str, vocab: int) -> list[int]:
    """Bytes of the results of all gathers in a program's text, without embedding and head."""
    found = []
    for result in re.findall(r" = (.*?) all-gather(?:-start)?\(", text):
        shapes = [
            (kind, [int(n) for n in sizes.split(",") if n])
            for kind, sizes in _SHAPE.findall(result)
        ]
        if not any(vocab in sizes for _, sizes in shapes):
            found.append(sum(_BYTES.get(kind, 4) * math.prod(sizes) for kind, sizes in shapes))
    return found
