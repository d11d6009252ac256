"""The families of Toybox's scenes, those whose sights and sounds belong together among them.

* sync: a thing bounces and a beep is heard, at the same time or not. Each is at each of its three
  times as often, whatever the answer is, so neither tells anything by itself.
* sounding: of two things that are shown one after the other, one makes a sound while it is there.
"""

import dataclasses

import numpy as np

from vllama2_jax.data.toybox import sights, sounds
from vllama2_jax.data.toybox.scenes import (
    CHANGES,
    COUNTS,
    GLIDES,
    MOMENT_SECONDS,
    NOISES,
    PAIRS,
    PITCHES,
    SPLITS,
    TIMES,
    Scene,
    is_heldout,
)

# What media the clips of a family have: what is only seen, only heard, or both.
FAMILIES_OF = {
    "video": ("motion", "order", "count", "change", "bounce"),
    "audio": ("pitch", "glide", "beeps", "noise", "timing"),
    "av": ("sync", "sounding"),
}
FAMILIES = tuple(family for families in FAMILIES_OF.values() for family in families)
MEDIA_OF = {family: media for media, families in FAMILIES_OF.items() for family in families}

# (bounce, beep): as many that coincide as not, and each of either as often in both halves.
_TOGETHER = [(number, number) for number in range(len(TIMES))] * 2
_APART = [(a, b) for a in range(len(TIMES)) for b in range(len(TIMES)) if a != b]
_SYNCS = [pair for pairs in zip(_TOGETHER, _APART, strict=True) for pair in pairs]


def strata(family: str, split: str) -> int:
    """How many values of `stratum` in `sample_scene` cover a family's answers evenly."""
    return {
        "motion": len(sights.MOTIONS[split]),
        "order": len(PAIRS),
        "count": len(COUNTS),
        "change": len(CHANGES),
        "bounce": len(TIMES),
        "pitch": len(PITCHES),
        "glide": len(GLIDES),
        "beeps": len(COUNTS),
        "noise": len(NOISES),
        "timing": len(TIMES),
        "sync": len(_SYNCS),
        "sounding": 2 * len(PAIRS),
    }[family]


def sample_scene(
    rng: np.random.Generator, split: str, family: str, stratum: int | None = None
) -> Scene:
    """Draw a scene by lot.

    Args:
      rng: the only source of chance.
      split: "train" or "heldout"; decides which combinations may appear.
      family: one of `FAMILIES`.
      stratum: which answer the scene has, modulo `strata`; None draws it. Counting upwards gives
        every answer equally often.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    if family not in FAMILIES:
        raise ValueError(f"unknown scene family {family!r}; known: {', '.join(FAMILIES)}")
    size = strata(family, split)
    stratum = int(rng.integers(size)) if stratum is None else stratum % size
    return _SAMPLERS[family](rng, split, stratum)


def _sync(rng, split, stratum) -> Scene:
    when, heard = _SYNCS[stratum]
    # Not by when the beep is, which what is seen would tell then.
    pairs = [pair for pair in PAIRS if is_heldout([pair], when) == (split == "heldout")]
    moments = list(TIMES.values())
    thing, seen = sights.bouncing(rng, pairs[rng.integers(len(pairs))], moments[when])
    beep = sounds.beep(rng, sounds.any_voice(rng), moments[heard])
    return Scene("sync", seen, (thing,), "yes" if when == heard else "no", (beep,))


def _sounding(rng, split, stratum) -> Scene:
    number, which = divmod(stratum, 2)
    scene = sights.order(rng, split, number)
    thing = scene.things[which]
    seen = [i for i, moment in enumerate(scene.moments) if thing in moment.things]
    first, last = seen[0] * MOMENT_SECONDS, (seen[-1] + 1) * MOMENT_SECONDS
    tone = sounds.tone_within(rng, sounds.any_voice(rng), first, last)
    return dataclasses.replace(scene, family="sounding", fact=thing.name, events=(tone,))


_SAMPLERS = {
    **{name: getattr(sights, name) for name in FAMILIES_OF["video"]},
    **{name: getattr(sounds, name) for name in FAMILIES_OF["audio"]},
    "sync": _sync,
    "sounding": _sounding,
}
