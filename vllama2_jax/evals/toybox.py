"""How well a model answers Toybox's held-out questions, beside what it can do without the video.

    python -m vllama2_jax.evals.toybox tiny

Three conditions: the encoded video as it is; blind, the question alone; shuffled, the sampled
frames in random order. For the temporal kinds the last two carry nothing, so an accuracy beyond
chance would show that the questions or the frames give the answer away.
"""

import argparse
import collections
import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from vllama2_jax.data.records import Record, read_records
from vllama2_jax.data.toybox import PLACEHOLDER, write_toybox
from vllama2_jax.data.toybox_questions import CHANCE, KINDS, TEMPORAL_KINDS
from vllama2_jax.media import load_clip

CONDITIONS = ("video", "blind", "shuffled")
_MAX_NEW_TOKENS = 8
_CLIPS = 2000  # 500 of each family, so 500 questions of each kind


@dataclasses.dataclass(frozen=True)
class Score:
    """Accuracy on one kind of question.

    Attributes:
      kind: the kind.
      count: number of questions.
      chance: what a guesser gets right.
      accuracy: of each of `CONDITIONS`, exact match of the greedy answer.
    """

    kind: str
    count: int
    chance: float
    accuracy: dict[str, float]

    @property
    def sigma(self) -> float:
        """Standard deviation of a guesser's accuracy."""
        return math.sqrt(self.chance * (1 - self.chance) / self.count)


def evaluate_toybox(
    model,
    records: Sequence[Record],
    media_root: str | Path,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Ask every record's question under all conditions.

    Args:
      model: of `vllama2_jax.load` (its `ask_batch`, `card` and `config` are used).
      records: of a Toybox's JSON.
      media_root: its folder.
      seed: of the shuffles.
      progress: called with (answers done, answers in all).

    Returns:
      One score per kind that occurs.

    Raises:
      ValueError: for a record without a video, or of a kind that Toybox does not know.
    """
    strange = [r.id for r in records if not _is_question(r)]
    if strange:
        raise ValueError(f"not questions of a Toybox: {', '.join(strange)}")
    rng = np.random.default_rng(seed)
    questions = [record.turns[0][0].removeprefix(PLACEHOLDER) for record in records]
    paths = [Path(media_root) / record.media.source for record in records]
    media = {"video": paths, "blind": [None] * len(records)}
    media["shuffled"] = [_shuffled(model, path, rng) for path in paths]
    hits = collections.defaultdict(list)
    done_before = 0

    def report(done, total):
        if progress:
            progress(done_before + done, len(CONDITIONS) * total)

    for condition in CONDITIONS:
        answers = model.ask_batch(
            list(zip(media[condition], questions, strict=True)),
            max_new_tokens=_MAX_NEW_TOKENS,
            progress=report,
        )
        for record, answer in zip(records, answers, strict=True):
            hits[record.kind, condition].append(answer == record.turns[0][1])
        done_before += len(records)
    return [
        Score(
            kind,
            len(hits[kind, "video"]),
            CHANCE[kind],
            {condition: float(np.mean(hits[kind, condition])) for condition in CONDITIONS},
        )
        for kind in KINDS
        if hits[kind, "video"]
    ]


def score_table(scores: Sequence[Score]) -> Table:
    """Scores as a table, in per cent; temporal kinds are starred."""
    table = Table(title="Toybox, held-out questions (accuracy in %)")
    for name in ("kind", "n", "video", "blind", "shuffled", "chance", "sigma"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for score in scores:
        star = "*" if score.kind in TEMPORAL_KINDS else ""
        table.add_row(
            score.kind + star,
            str(score.count),
            *(f"{100 * score.accuracy[condition]:.1f}" for condition in CONDITIONS),
            f"{100 * score.chance:.1f}",
            f"{100 * score.sigma:.1f}",
        )
    return table


def _is_question(record: Record) -> bool:
    video = record.media is not None and record.media.kind == "video"
    return video and len(record.media.paths) == 1 and record.kind in KINDS


def _shuffled(model, path: Path, rng) -> np.ndarray:
    """The frames that the model looks at, uint8 [T, S, S, 3], in random order."""
    clip = load_clip(
        path, spec=model.card.image, num_frames=model.config.num_frames, preset=model.card.preset
    )
    return clip.frames[rng.permutation(clip.frame_index)]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table for a model, on a Toybox at hand or on one made for the purpose."""
    from vllama2_jax.loading import load
    from vllama2_jax.progress import bar

    parser = argparse.ArgumentParser(description="Accuracy on Toybox's held-out questions.")
    parser.add_argument("model", help="any model that vllama2_jax.load takes")
    parser.add_argument("--toybox", help="a folder of `vllama2 data toybox`; made if not given")
    parser.add_argument("--clips", type=int, default=_CLIPS, help="held-out clips to make")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    model = load(options.model)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(options.toybox or Path(made) / "toybox")
        if not options.toybox:
            with bar("rendering", unit="clips") as progress:
                write_toybox(folder, 4, options.seed, heldout=options.clips, progress=progress)
        records = read_records(folder / "heldout.json")
        with bar("asking", unit="answers") as progress:
            scores = evaluate_toybox(model, records, folder, options.seed, progress)
    Console(width=100).print(score_table(scores))


if __name__ == "__main__":
    main()
