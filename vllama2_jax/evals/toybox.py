"""How well a model answers Toybox's held-out questions, beside what it can do without the media.

    python -m vllama2_jax.evals.toybox tiny

Conditions: whole, the file as it is; blind, the question alone; of videos shuffled, the sampled
frames in random order; of videos with sound pictures, without the sound, and sound, without the
pictures. For the temporal kinds blind and shuffled carry nothing, and for those that are about
pictures and sound together nor does either alone, so an accuracy beyond chance would show that
something gives the answer away.
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
from vllama2_jax.data.toybox.families import FAMILIES, FAMILIES_OF
from vllama2_jax.data.toybox.files import write_toybox
from vllama2_jax.data.toybox.questions import CHANCE, KINDS, TEMPORAL_KINDS
from vllama2_jax.media import load_clip

WHOLE, BLIND, SHUFFLED, PICTURES, SOUND = "whole", "blind", "shuffled", "pictures", "sound"
# What is asked of questions about each kind of media.
CONDITIONS_OF = {
    "video": (WHOLE, BLIND, SHUFFLED),
    "audio": (WHOLE, BLIND),
    "av": (WHOLE, BLIND, PICTURES, SOUND),
}
CONDITIONS = (WHOLE, BLIND, SHUFFLED, PICTURES, SOUND)
_MODALITY = {PICTURES: "video", SOUND: "audio"}
_MAX_NEW_TOKENS = 8
_CLIPS = 500  # of each family, so 500 questions of each kind


@dataclasses.dataclass(frozen=True)
class Score:
    """Accuracy on one kind of question.

    Attributes:
      kind: the kind.
      count: number of questions.
      chance: what a guesser gets right.
      accuracy: of each condition under which it is asked, exact match of the greedy answer.
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
    """Ask every record's question under each condition of its media.

    Args:
      model: of `vllama2_jax.load` (its `ask_batch`, `card` and `config` are used).
      records: of a Toybox's JSON.
      media_root: its folder.
      seed: of the shuffles.
      progress: called with (answers done, answers in all).

    Returns:
      One score per kind that occurs.

    Raises:
      ValueError: for a record without media, or of a kind that Toybox does not know.
    """
    strange = [r.id for r in records if not _is_question(r)]
    if strange:
        raise ValueError(f"not questions of a Toybox: {', '.join(strange)}")
    rng = np.random.default_rng(seed)
    hits, counts = collections.defaultdict(list), collections.Counter(r.kind for r in records)
    done, total = 0, sum(len(CONDITIONS_OF[record.media.kind]) for record in records)

    def report(answered, _):
        if progress:
            progress(done + answered, total)

    for condition in CONDITIONS:
        asked = [r for r in records if condition in CONDITIONS_OF[r.media.kind]]
        if not asked:
            continue
        answers = model.ask_batch(
            [_pair(model, record, condition, Path(media_root), rng) for record in asked],
            modality=_MODALITY.get(condition, "auto"),
            max_new_tokens=_MAX_NEW_TOKENS,
            progress=report,
        )
        for record, answer in zip(asked, answers, strict=True):
            hits[record.kind, condition].append(answer == record.turns[0][1])
        done += len(asked)
    return [
        Score(
            kind,
            counts[kind],
            CHANCE[kind],
            {c: float(np.mean(hits[kind, c])) for c in CONDITIONS if hits[kind, c]},
        )
        for kind in KINDS
        if counts[kind]
    ]


def _pair(model, record: Record, condition: str, root: Path, rng) -> tuple:
    """What `ask_batch` takes."""
    question = record.turns[0][0].replace(record.media.placeholder, "", 1).strip()
    if condition == BLIND:
        return None, question
    path = root / record.media.source
    return (_shuffled(model, path, rng) if condition == SHUFFLED else path), question


def score_table(scores: Sequence[Score]) -> Table:
    """Scores as a table, in per cent; temporal kinds are starred."""
    table = Table(title="Toybox, held-out questions (accuracy in %)")
    for name in ("kind", "n", *CONDITIONS, "chance", "sigma"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for score in scores:
        star = "*" if score.kind in TEMPORAL_KINDS else ""
        table.add_row(
            score.kind + star,
            str(score.count),
            *(f"{100 * score.accuracy[c]:.1f}" if c in score.accuracy else "" for c in CONDITIONS),
            f"{100 * score.chance:.1f}",
            f"{100 * score.sigma:.1f}",
        )
    return table


def _is_question(record: Record) -> bool:
    media = record.media
    asked = media is not None and media.kind in CONDITIONS_OF and len(media.paths) == 1
    return asked and record.kind in KINDS


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
    parser.add_argument(
        "--media",
        choices=(*FAMILIES_OF, "all"),
        help="what the questions are about (all, or video for a model that does not hear)",
    )
    parser.add_argument("--clips", type=int, help="held-out clips to make (500 of each family)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    model = load(options.model)
    hears = model.card.sound is not None
    media = options.media or ("all" if hears else "video")
    if media != "video" and not hears:
        parser.error(f"{options.model} does not hear; ask it about --media video")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(options.toybox or Path(made) / "toybox")
        if not options.toybox:
            families = FAMILIES_OF.get(media, FAMILIES)
            clips = options.clips or _CLIPS * len(families)
            with bar("rendering", unit="clips") as progress:
                write_toybox(folder, len(families), options.seed, clips, families, progress)
        records = read_records(folder / "heldout.json")
        records = [r for r in records if media in ("all", r.media.kind)]
        with bar("asking", unit="answers") as progress:
            scores = evaluate_toybox(model, records, folder, options.seed, progress)
    Console(width=100).print(score_table(scores))


if __name__ == "__main__":
    main()
