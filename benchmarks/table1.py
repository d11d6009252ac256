"""The nine connectors of the paper's Table 1, trained alike on Toybox.

    python benchmarks/table1.py [--out runs/table1] [--seeds 3] [--lessons 300] [--steps 250]

Every run begins with `tiny`'s tower and decoder and a new connector. The connector first learns by
itself, behind heads, as that of `tiny` did (a new one behind a decoder learns nothing in minutes).
Then connector and decoder train by the rules of `configs/tiny_video_sft.py`. All see the same clips
in the same order, in rows that differ by the connector's tokens alone. At the end the model answers
600 held-out questions.

Each run has a folder in `--out`. Those that are finished are read, an interrupted one goes on.
"""

import argparse
import dataclasses
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from rich.console import Console

from vllama2_jax.checkpoints import is_saved_model, save_model
from vllama2_jax.checkpoints.store import flatten
from vllama2_jax.configs import build, parse
from vllama2_jax.data.toybox.questions import CHANCE
from vllama2_jax.models.config import VLlama2Config
from vllama2_jax.models.vllama2 import abstract_params
from vllama2_jax.models.zoo import model_config
from vllama2_jax.text import load_tokenizer, tokenizer_files
from vllama2_jax.train.config import StartConfig, TrainConfig
from vllama2_jax.train.metrics import FILE_NAME, read_metrics
from vllama2_jax.train.run import run
from vllama2_jax.train.schooling import SEEING, teach
from vllama2_jax.train.start import begin, describe_start

_KINDS = tuple(f"table1_row{number}" for number in range(1, 10))
_QUESTIONS = 600
# What a picture shows, what two pictures show, and what only their order shows.
_GROUPS = {
    "static": ("colour", "shape", "count"),
    "change": ("change",),
    "temporal": ("direction", "order", "bounce"),
}
_REMARKS = "## "  # begins what a person has written below the table


class Result(NamedTuple):
    """A finished run.

    Attributes:
      accuracy: of each of `_GROUPS`, the mean over its kinds.
      seconds: of a step, median.
      samples: that were trained on.
    """

    accuracy: dict[str, float]
    seconds: float
    samples: int


def beginning(kind: str) -> StartConfig:
    """`tiny` with a new connector."""
    return StartConfig("tiny", connector="random", connector_kind=kind, narrow=True)


def school(kind: str, seed: int, steps: int, folder: Path) -> None:
    """Save the model that a run begins with."""
    if is_saved_model(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)  # of a schooling that was cut short
    params, card, tokenizer_folder = begin(beginning(kind), "float32", seed)
    tokenizer = load_tokenizer(tokenizer_folder)
    (lesson,) = (lesson for lesson in SEEING if lesson.part == "connector")
    params, _ = teach(dataclasses.replace(lesson, steps=steps), params, card, tokenizer, seed)
    save_model(folder, params, card, tokenizer_files(tokenizer_folder))


def experiment(kind: str, seed: int, steps: int, start: Path) -> TrainConfig:
    """The run of one connector and one seed."""
    config = parse(["config:tiny_video_sft"])
    config.name = kind
    config.start.model = str(start)
    clips, bare = config.data.sources
    clips.records, bare.records = steps * config.rows, steps * config.rows // 3
    extra = network(kind).num_media_tokens() - model_config("tiny").num_media_tokens()
    config.data.max_length += extra
    config.data.buckets = (config.data.max_length,)
    config.validation.sources[0].records = _QUESTIONS
    config.validation.max_records = _QUESTIONS
    config.validation.every = config.save.every = 10 * steps  # at the end, and when stopped
    config.save.keep_last = 1
    config.seed = seed
    return build(config)


def network(kind: str) -> VLlama2Config:
    """What a run trains."""
    return describe_start(beginning(kind))[0].config


def result(folder: Path) -> Result | None:
    """What a run has come to, None if it is not finished."""
    if not (folder / FILE_NAME).is_file():
        return None
    records = read_metrics(folder)
    if not records or "accuracy/direction" not in records[-1]:
        return None
    accuracy = {
        group: statistics.mean(records[-1][f"accuracy/{kind}"] for kind in kinds)
        for group, kinds in _GROUPS.items()
    }
    return Result(
        accuracy,
        statistics.median(record["seconds"] for record in records),
        sum(record["samples"] for record in records),
    )


def words(config: VLlama2Config) -> list[str]:
    """The cells that say which connector it is."""
    connector = config.connector
    sampler = "mean over time" if connector.sampler == "mean" else connector.sampler
    sizes = [leaf.size for leaf in flatten(abstract_params(config)["connector"]).values()]
    return [
        connector.kind.removeprefix("table1_row"),
        "yes" if connector.depth else "no",
        sampler,
        "x".join(map(str, connector.downsample)),
        str(config.num_media_tokens()),
        f"{sum(sizes):,}",
    ]


def table(results: dict[str, list[Result]]) -> list[str]:
    """Markdown lines, one per connector."""
    names = ["row", "RegStage", "sampler", "down", "tokens", "parameters"]
    names += [f"{group} %" for group in _GROUPS] + ["s / step", "seeds"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for kind, found in results.items():
        cells = words(network(kind))
        for group in _GROUPS:
            values = [100 * each.accuracy[group] for each in found]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}" if values else "")
        seconds = statistics.median(each.seconds for each in found) if found else float("nan")
        cells += [f"{seconds:.3f}", str(len(found))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def document(options, results: dict[str, list[Result]]) -> str:
    """The page, without what a person adds to it."""
    samples = sorted({each.samples for found in results.values() for each in found})
    chance = ", ".join(
        f"{group} {100 * statistics.mean(CHANCE[kind] for kind in kinds):.1f} %"
        for group, kinds in _GROUPS.items()
    )
    return "\n".join(
        [
            "# Table 1 on Toybox",
            "",
            f"`python benchmarks/table1.py --seeds {options.seeds} --lessons {options.lessons} "
            f"--steps {options.steps}`, "
            f"{len(os.sched_getaffinity(0))} cores, jax {jax.__version__}. "
            f"{', '.join(map(str, samples))} samples a run; {_QUESTIONS} held-out questions, as "
            "many of each kind; mean and standard deviation over the seeds. Static is the mean of "
            "colour, shape and count, temporal that of direction and order. By chance: "
            f"{chance}.",
            "",
            *table(results),
            "",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/table1"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--lessons", type=int, default=300, help="steps of the connector alone")
    parser.add_argument("--steps", type=int, default=250, help="of connector and decoder")
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=_KINDS, metavar="KIND")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the page, too")
    options = parser.parse_args()
    console = Console()
    # A connector's programs are those of all its seeds.
    jax.config.update("jax_compilation_cache_dir", str(options.out.absolute() / "programs"))
    results = {kind: [] for kind in options.kinds}
    for seed in range(options.seeds):
        for kind in options.kinds:
            folder = options.out / f"{kind}-{seed}"
            if result(folder) is None:
                console.print(f"{folder} ...")
                began = time.monotonic()
                start = folder.with_name(f"{folder.name}-start")
                school(kind, seed, options.lessons, start)
                if run(experiment(kind, seed, options.steps, start), folder).stopped_by:
                    return
                console.print(f"{folder}: {time.monotonic() - began:.0f} s")
            results[kind].append(result(folder))
    page = document(options, results)
    print(page)
    if options.markdown:
        before = options.markdown.read_text() if options.markdown.exists() else ""
        _, heading, remarks = before.partition(f"\n{_REMARKS}")
        options.markdown.write_text(page + heading + remarks)


if __name__ == "__main__":
    main()
