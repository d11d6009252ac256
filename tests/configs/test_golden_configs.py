"""Every recipe, flattened, is what lies in `golden/`: a change to one shows as a diff.

UPDATE_GOLDEN=1 make test   writes the files anew
"""

import os
from pathlib import Path

import pytest

from vllama2_jax.configs import RECIPES, build, parse
from vllama2_jax.train.config import flat_json, to_json

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = [
    *([f"config:{name}"] for name in RECIPES),
    ["config:video_pretrain", "fiddler:released_scripts"],
    ["config:video_pretrain", "fiddler:quick_start"],
    ["config:video_sft", "fiddler:released_scripts"],
    ["config:video_sft", "fiddler:quick_start"],
    ["config:video_sft", "fiddler:released_scripts", "fiddler:lora"],
    ["config:video_sft", "fiddler:released_scripts", "fiddler:qlora"],
    ["config:av_joint", "fiddler:released_scripts"],
]


def name_of(directives):
    return "+".join(directive.partition(":")[2] for directive in directives)


@pytest.mark.parametrize("directives", VARIANTS, ids=name_of)
def test_recipe_is_as_it_was_agreed(directives):
    flat = flat_json(to_json(build(parse(directives))))
    lines = "".join(f"{path} = {value!r}\n" for path, value in flat.items())
    path = GOLDEN / f"{name_of(directives)}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(lines)
    assert lines == path.read_text()


def test_golden_files_are_those_of_the_recipes():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {name_of(v) for v in VARIANTS}
