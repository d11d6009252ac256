"""Plans of the published models on pods: does it fit, how much memory, how long is a step.

    python benchmarks/pods.py [--only 8x7B] [--table] [--estimate] [--page docs/results/plan.md]

Compiles about forty steps, minutes each, and keeps what each said in docs/results/pods.jsonl, from
which an interrupted run goes on; a line that is taken out is compiled anew. `--estimate` says by
formulas what has not been compiled, and keeps it not. `--page` writes the tables into the page's
own places. Needs `make env EXTRAS=tpu`, and no TPU.

Four tables. Of every model, step of the recipe and slice: the recipe's batch, on the first mesh of
`vllama2 plan --search` that fits. Of the language model of 8x7B alone: beside what MaxText took. Of
the same with two rows a chip on 64 to 512 chips: what each chip sends. Of all that was compiled:
how near formulas come.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import re
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rich.console import Console
from rich.table import Table

from vllama2_jax.configs.parse import build
from vllama2_jax.configs.shortcuts import Shortcuts, resolve
from vllama2_jax.parallel.topology import topology
from vllama2_jax.plan.estimate import estimate
from vllama2_jax.plan.planning import plan
from vllama2_jax.plan.search import mesh_and_batch, search

SLICES = ("v5p-128", "v4-128", "v5e-256")
MODELS = ("2-8x7B", "2-7B", "2.1-7B-AV", "2-72B", "2-7B-16F")
STEPS = ("video_sft", "video_pretrain")
# chips: slice; two rows of each chip.
SCALING = {64: "v5p:4x4x4", 128: "v5p:4x4x8", 256: "v5p:4x8x8", 512: "v5p:8x8x8"}
# MaxText, compiled for the same on the same kind of machine, which was busy.
MAXTEXT = ("92 to 96 s", "4.38 GB", "13.3 GB", "369 GB", "186 GB")


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is planned.

    Attributes:
      kind: "pods" or "decoder".
      model, recipe, slice: as on the command line.
      rows: of a step; None is the recipe's.
    """

    kind: str
    model: str
    recipe: str
    slice: str
    rows: int | None = None

    @property
    def key(self) -> str:
        """Under which its result is kept."""
        return "/".join(map(str, dataclasses.astuple(self)))


def cells() -> list[Cell]:
    """All of them; what is asked for first stands first."""
    found = [
        Cell("decoder", "2-8x7B", "decoder_only", name, 2 * chips)
        for chips, name in SCALING.items()
    ]
    for name in SLICES:
        for model in MODELS:
            recipes = (*STEPS, "av_joint") if model == "2.1-7B-AV" else STEPS
            found += [Cell("pods", model, recipe, name) for recipe in recipes]
    found.insert(8, Cell("pods", "2-72B", "video_sft", "v5p-256"))
    return found


def config_of(cell: Cell):
    """The run that is planned."""
    shortcuts = Shortcuts(model=cell.model, batch=cell.rows)
    return build(resolve([f"config:{cell.recipe}"], shortcuts))


def planned(cell: Cell, console: Console, compiling: bool = True) -> dict:
    """The plan of a cell as JSON, with its mesh and batch in words and what formulas say of it."""
    config, where = config_of(cell), topology(cell.slice)
    if cell.kind == "decoder":
        found = plan(config, where)
    else:
        tell = lambda text: console.print(f"  {text}", highlight=False)  # noqa: E731
        found = search(config, where, most=int(compiling), told=tell)[0]
    guess = estimate(found.config, where)
    said = found.to_json() | {"in_words": mesh_and_batch(found)}
    said["formulas"] = {"wire_bytes": guess.wire_bytes, "peak": guess.memory.peak}
    del said["assumptions"]
    return said


def gigabytes(count) -> str:
    """Without a unit."""
    return "-" if count is None else f"{count / 1e9:,.1f}"


def of_pods(found: dict[str, dict]) -> tuple[str, list[str], list[list[str]]]:
    """The recipe on slices: title, columns, rows."""
    columns = ["model", "step", "slice", "fits", "mesh and batch", "arguments", "peak", "limit"]
    columns += ["sent", "step, s", "utilisation", "stage, hours"]
    rows = []
    for cell in cells():
        said = found.get(cell.key)
        if cell.kind != "pods" or said is None:
            continue
        memory, roof, stage = said["hbm_bytes_per_chip"], said["roofline"], said["stage"]
        fits = "yes" if said["fits"] else "no"
        rows.append(
            [
                *(cell.model, cell.recipe, cell.slice),
                fits + (" (by formulas)" if said["estimated"] else ""),
                said["in_words"],
                *(gigabytes(memory[name]) for name in ("arguments", "peak", "limit")),
                gigabytes(said["wire_bytes"]),
                f"{roof['step_seconds']:.2f}" if roof else "-",
                f"{roof['utilisation']:.1%}" if roof else "-",
                f"{stage['hours']:,.1f}" if roof and stage else "-",
            ]
        )
    return "One step of the recipe, of each chip (GB)", columns, rows


def of_the_decoder(found: dict[str, dict]) -> tuple[str, list[str], list[list[str]]]:
    """The language model alone, beside MaxText."""
    rows = []
    if said := found.get(next(cell.key for cell in cells() if cell.kind == "decoder")):
        memory = said["hbm_bytes_per_chip"]
        sums = sum(c["wire_bytes"] for c in said["collectives"] if c["kind"] == "all-reduce")
        ours = (
            f"{said['compile_seconds']:.0f} s",
            *(f"{memory[name] / 1e9:.2f} GB" for name in ("arguments", "peak")),
            *(f"{gigabytes(count)} GB" for count in (said["wire_bytes"], sums)),
        )
        names = ("compiled in", "arguments of a chip", "peak of a chip")
        names += ("on the wire, chip and step", "of it all-reduces")
        rows = [list(row) for row in zip(names, ours, MAXTEXT, strict=True)]
    return "8x7B's language model alone, 64 chips of v5p", ["", "ours", "MaxText"], rows


def of_scaling(found: dict[str, dict]) -> tuple[str, list[str], list[list[str]]]:
    """The same on more chips."""
    rows = []
    for said in (found[c.key] for c in cells() if c.kind == "decoder" and c.key in found):
        sent = {one["kind"]: one["wire_bytes"] for one in said["collectives"]}
        kinds = ("all-gather", "reduce-scatter", "all-reduce")
        rows.append(
            [
                str(said["chips"]),
                *(gigabytes(sent.get(kind, 0)) for kind in kinds),
                gigabytes(said["wire_bytes"]),
                gigabytes(said["hbm_bytes_per_chip"]["peak"]),
                f"{said['roofline']['step_seconds']:.2f}" if said["roofline"] else "-",
            ]
        )
    columns = ["chips", "gathered", "scattered", "all-reduced", "on the wire", "peak", "step, s"]
    return "Two rows a chip, of each chip and step (GB)", columns, rows


def of_formulas(found: dict[str, dict]) -> tuple[str, list[str], list[list[str]]]:
    """What was compiled, beside what formulas say of it."""
    rows = []
    for cell in cells():
        said = found.get(cell.key)
        if said is None or said["estimated"]:
            continue
        guess, peak = said["formulas"], said["hbm_bytes_per_chip"]["peak"]
        numbers = guess["wire_bytes"], said["wire_bytes"], guess["peak"], peak
        ratio = f"{guess['peak'] / peak:.2f}" if peak else "-"
        what = [cell.model, cell.recipe, cell.slice]
        rows.append([*what, *map(gigabytes, numbers), ratio])
    columns = ["model", "step", "slice", "sent, formulas", "sent", "peak, formulas", "peak"]
    return "Formulas and compiled programs (GB)", [*columns, "of it"], rows


TABLES = {
    "recipe": of_pods,
    "decoder": of_the_decoder,
    "scaling": of_scaling,
    "formulas": of_formulas,
}


def show(title: str, columns: list[str], rows: list[list[str]], console: Console) -> None:
    """Print a table."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def write(page: Path, name: str, columns: list[str], rows: list[list[str]]) -> None:
    """Put a table into its place on a page, between `<!-- table NAME -->` and `<!-- end -->`."""
    lines = [columns, ["---"] * len(columns), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    begin, end = f"<!-- table {name} -->\n", "\n<!-- end -->"
    place = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    text, places = place.subn(lambda _: begin + table + end, page.read_text(encoding="utf-8"))
    if places != 1:
        raise SystemExit(f"{page} has {places} places for the table {name}; it needs one")
    page.write_text(text, encoding="utf-8")


def read(kept: Path) -> dict[str, dict]:
    """What an earlier run has kept, {key of a cell: plan}."""
    if not kept.exists():
        return {}
    lines = map(json.loads, kept.read_text(encoding="utf-8").splitlines())
    return {line["key"]: line["plan"] for line in lines}


def made_with() -> dict[str, str]:
    """What a result depends on besides the code."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    return packages | {"date": datetime.date.today().isoformat()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kept", type=Path, default="docs/results/pods.jsonl", help="where results are kept"
    )
    parser.add_argument("--only", default="", help="cells whose key holds this")
    parser.add_argument("--table", action="store_true", help="compile nothing, show what is kept")
    parser.add_argument(
        "--estimate", action="store_true", help="formulas for what is not compiled yet"
    )
    parser.add_argument("--page", type=Path, help="write the tables into this page, too")
    options = parser.parse_args()
    kept, console = options.kept, Console(width=200)
    found = read(kept)
    for cell in cells():
        if options.table or cell.key in found or options.only not in cell.key:
            continue
        console.print(cell.key, highlight=False)
        try:
            found[cell.key] = planned(cell, console)
        except ValueError as error:
            console.print(f"  {error}", highlight=False)
            continue
        kept.parent.mkdir(parents=True, exist_ok=True)
        with kept.open("a", encoding="utf-8") as file:
            line = {"key": cell.key, "made": made_with(), "plan": found[cell.key]}
            file.write(json.dumps(line) + "\n")
    if options.estimate:
        for cell in cells():
            if cell.kind == "pods" and cell.key not in found:
                found[cell.key] = planned(cell, console, compiling=False)
    for name, table in TABLES.items():
        title, columns, rows = table(found)
        if rows:
            show(title, columns, rows, console)
            if options.page:
                write(options.page, name, columns, rows)


if __name__ == "__main__":
    main()
