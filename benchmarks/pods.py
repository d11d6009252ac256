"""Plans of the published models on pods: does it fit, how much memory, how long is a step.

    python benchmarks/pods.py [--kept runs/pods.jsonl] [--only 8x7B] [--table] [--estimate]

Compiles about forty steps, minutes each, and keeps what each said in a file, from which an
interrupted run goes on; `--estimate` says by formulas what has not been compiled, and keeps it not.
Needs `make env EXTRAS=tpu`, and no TPU.

Three tables. Of every model, step of the recipe and slice: the recipe's batch, on the first mesh of
`vllama2 plan --search` that fits. Of the language model of 8x7B alone: beside what MaxText took. Of
the same with two rows a chip on 64 to 512 chips: what each chip sends.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from rich.console import Console
from rich.table import Table

from vllama2_jax.configs.parse import build
from vllama2_jax.configs.shortcuts import Shortcuts, resolve
from vllama2_jax.parallel.topology import topology
from vllama2_jax.plan.planning import plan
from vllama2_jax.plan.search import mesh_and_batch, search

SLICES = ("v5p-128", "v4-128", "v5e-256")
MODELS = ("2-8x7B", "2-7B", "2.1-7B-AV", "2-72B", "2-7B-16F")
STEPS = ("video_sft", "video_pretrain")
# chips: slice; two rows of each chip.
SCALING = {64: "v5p:4x4x4", 128: "v5p:4x4x8", 256: "v5p:4x8x8", 512: "v5p:8x8x8"}
# MaxText, compiled for the same on the same kind of machine, which was busy.
MAXTEXT = ("92 to 96 s", "4.38 GB", "13.3 GB", "369 GB")


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


def planned(cell: Cell, console: Console, compiling: bool = True) -> dict:
    """The plan of a cell as JSON, and its mesh and batch in words."""
    shortcuts = Shortcuts(model=cell.model, batch=cell.rows)
    config = build(resolve([f"config:{cell.recipe}"], shortcuts))
    where = topology(cell.slice)
    if cell.kind == "decoder":
        found = plan(config, where)
    else:
        tell = lambda text: console.print(f"  {text}", highlight=False)  # noqa: E731
        found = search(config, where, most=int(compiling), told=tell)[0]
    return {**found.to_json(), "in_words": mesh_and_batch(found)}


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
        ours = (
            f"{said['compile_seconds']:.0f} s",
            *(f"{gigabytes(memory[name])} GB" for name in ("arguments", "peak")),
            f"{gigabytes(said['wire_bytes'])} GB",
        )
        names = ("compiled in", "arguments of a chip", "peak of a chip", "sent by a chip and step")
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


def show(title: str, columns: list[str], rows: list[list[str]], console, markdown: bool):
    """Print a table, for people at a terminal or for a page."""
    if not markdown:
        table = Table(*columns, title=title)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    print(f"{title}:\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    print("\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kept", default="runs/pods.jsonl", help="where results are kept")
    parser.add_argument("--only", default="", help="cells whose key holds this")
    parser.add_argument("--table", action="store_true", help="compile nothing, show what is kept")
    parser.add_argument(
        "--estimate", action="store_true", help="formulas for what is not compiled yet"
    )
    parser.add_argument("--markdown", action="store_true", help="tables as a page has them")
    options = parser.parse_args()
    kept, console = Path(options.kept), Console(width=200)
    found = {}
    if kept.exists():
        lines = map(json.loads, kept.read_text().splitlines())
        found = {line["key"]: line["plan"] for line in lines}
    kept.parent.mkdir(parents=True, exist_ok=True)
    for cell in cells():
        if options.table or cell.key in found or options.only not in cell.key:
            continue
        console.print(cell.key, highlight=False)
        try:
            found[cell.key] = planned(cell, console)
        except ValueError as error:
            console.print(f"  {error}", highlight=False)
            continue
        with kept.open("a") as file:
            file.write(json.dumps({"key": cell.key, "plan": found[cell.key]}) + "\n")
    if options.estimate:
        for cell in cells():
            if cell.kind == "pods" and cell.key not in found:
                found[cell.key] = planned(cell, console, compiling=False)
    for table in (of_pods, of_the_decoder, of_scaling):
        title, columns, rows = table(found)
        if rows:
            show(title, columns, rows, console, options.markdown)


if __name__ == "__main__":
    main()
