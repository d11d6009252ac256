"""Mixtures of sources: which record stands at which position of the training stream.

`Mixture.locate` is a pure function (seed, position) -> (source, record), without state and without
lists as long as the data, so that a run can begin anywhere, on any number of hosts. Orders come
from `permute`, in integer arithmetic alone: unlike NumPy's `Generator`, whose streams may change
between versions, it gives the same order everywhere, for good.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

# Positions of one round of a mixture by weights: shares are exact to 1 / ROUND.
ROUND = 1 << 16
_GOLDEN = 0x9E3779B97F4A7C15
_FEISTEL_ROUNDS = 6
_MIN_HALF_BITS = 3  # smaller blocks know too few different orders
_ORDER, _RECORDS = 1, 2  # what a permutation is for, so that no two share a key


def permute(index, size, *keys) -> np.ndarray:
    """Where a keyed shuffle of `size` things puts `index`: int64, a bijection of 0 .. size - 1.

    A Feistel network (Luby and Rackoff, 1988) over the next even number of bits, walked until it
    lands inside `size`; its round function is splitmix64's finaliser (Steele et al., 2014).

    Args:
      index: int [n], each in 0 .. size - 1.
      size: int, or int [n].
      *keys: ints at least 0, or int [n]; each combination gives its own order.
    """
    index, size, *keys = np.broadcast_arrays(np.atleast_1d(index), size, *keys)
    size = size.astype(np.uint64)
    value = index.astype(np.uint64)
    bits = np.ceil(np.log2(np.maximum(size, 2).astype(np.float64))).astype(np.uint64)
    half = np.maximum((bits + np.uint64(1)) // np.uint64(2), np.uint64(_MIN_HALF_BITS))
    key = np.zeros(value.shape, np.uint64)
    for part in keys:
        key = _mix(key ^ _mix(part.astype(np.uint64) + np.uint64(_GOLDEN)))
    value = _feistel(value, half, key)
    outside = np.flatnonzero(value >= size)
    while outside.size:
        value[outside] = _feistel(value[outside], half[outside], key[outside])
        outside = outside[value[outside] >= size[outside]]
    return value.astype(np.int64)


def _feistel(value: np.ndarray, half: np.ndarray, key: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for number in range(1, _FEISTEL_ROUNDS + 1):
        constant = np.uint64(number * _GOLDEN % 2**64)
        left, right = right, left ^ (_mix(right ^ (key + constant)) & mask)
    return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class Mixture:
    """An endless stream over several sources, in rounds with so many positions of each.

    Make one with `by_counts`, `by_weights` or `in_groups`. Each source is read in a shuffled order
    that goes on through the rounds: no record comes a second time before all have come once, and
    each epoch of a source has an order of its own.

    Attributes:
      sizes: records of each source.
      counts: positions of each source in a round.
      seed: decides every order; at least 0.
      finite: whether a round is what one calls an epoch of the mixture.
      pattern: source numbers of a group; a round is then groups one after the other, where
        otherwise its positions are shuffled.
      shuffled_once: each round begins at the front of every source again, in the same order.
    """

    sizes: tuple[int, ...]
    counts: tuple[int, ...]
    seed: int
    finite: bool = True
    pattern: tuple[int, ...] = ()
    shuffled_once: bool = False

    def __post_init__(self):
        if not self.sizes or len(self.sizes) != len(self.counts):
            raise ValueError(
                f"a mixture of {len(self.sizes)} sources has {len(self.counts)} shares; give one "
                "for each of at least one source"
            )
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            if size < 1 or count < 1:
                raise ValueError(
                    f"source {number} has {size} records and {count} positions in the mixture; "
                    "leave a source out that is empty or not to be read"
                )
        if self.seed < 0:
            raise ValueError(f"the seed is {self.seed}; give one that is at least 0")

    @classmethod
    def by_counts(cls, sizes: Sequence[int], counts: Sequence[int], seed: int) -> "Mixture":
        """So many samples of each source per epoch, in a new shuffled order each time.

        A count below its source's size takes other records in the next epoch; one above it begins
        the source again.
        """
        return cls(tuple(sizes), tuple(counts), seed)

    @classmethod
    def by_weights(cls, sizes: Sequence[int], weights: Sequence[float], seed: int) -> "Mixture":
        """Endless, each source with its share of the weights, exact to 1 / `ROUND`.

        Raises:
          ValueError: for a weight that is not positive, or too small to be kept.
        """
        weights = np.asarray(weights, np.float64)
        if not (np.isfinite(weights).all() and (weights > 0).all()):
            raise ValueError(f"weights must be positive numbers; got {weights.tolist()}")
        shares = weights / weights.sum() * ROUND
        counts = np.floor(shares).astype(np.int64)
        # Largest remainders, so that the counts add up to a round.
        short = ROUND - counts.sum()
        counts[np.argsort(counts - shares, kind="stable")[:short]] += 1
        if (counts == 0).any():
            number = int(np.argmin(counts))
            raise ValueError(
                f"source {number} has weight {weights[number]:g} of {weights.sum():g}, below one "
                f"position in {ROUND}; raise it or leave the source out"
            )
        return cls(tuple(sizes), tuple(counts.tolist()), seed, finite=False)

    @classmethod
    def in_groups(
        cls,
        sizes: Sequence[int],
        pattern: Sequence[int],
        seed: int,
        *,
        groups: int,
        shuffled_once: bool = False,
    ) -> "Mixture":
        """Groups whose members come from fixed sources, `groups` of them per epoch.

        Args:
          sizes: records of each source.
          pattern: source number of each member of a group; every source occurs.
          seed: decides the order of each source.
          groups: how many make an epoch.
          shuffled_once: see `Mixture`.
        """
        pattern = tuple(pattern)
        if not set(pattern) <= set(range(len(sizes))):
            raise ValueError(f"pattern {pattern} names sources beyond the {len(sizes)} given")
        counts = tuple(groups * pattern.count(number) for number in range(len(sizes)))
        return cls(tuple(sizes), counts, seed, pattern=pattern, shuffled_once=shuffled_once)

    @property
    def round_length(self) -> int:
        """Positions of a round."""
        return sum(self.counts)

    def __len__(self) -> int:
        """Positions of an epoch.

        Raises:
          TypeError: for a mixture by weights, which has none.
        """
        if not self.finite:
            raise TypeError("a mixture by weights has no end; say how many steps to take")
        return self.round_length

    def locate(self, positions) -> tuple[np.ndarray, np.ndarray]:
        """What stands at positions of the stream: (source, record), each int64 [n].

        Args:
          positions: int [n], at least 0.
        """
        positions = np.asarray(positions, np.int64)
        rounds, place = np.divmod(positions, self.round_length)
        counts, sizes = np.asarray(self.counts), np.asarray(self.sizes)
        if self.pattern:
            pattern = np.asarray(self.pattern)
            # How often a member's source occurs before it in the group.
            rank = np.array([self.pattern[:i].count(s) for i, s in enumerate(self.pattern)])
            group, member = np.divmod(place, len(pattern))
            source = pattern[member]
            within = group * np.bincount(pattern)[source] + rank[member]
        else:
            shuffled = permute(place, self.round_length, self.seed, _ORDER, rounds)
            ends = np.cumsum(counts)
            source = np.searchsorted(ends, shuffled, side="right")
            within = shuffled - (ends - counts)[source]
        drawn = within if self.shuffled_once else rounds * counts[source] + within
        epoch, index = np.divmod(drawn, sizes[source])
        if self.shuffled_once:
            epoch = np.zeros_like(epoch)
        return source, permute(index, sizes[source], self.seed, _RECORDS, source, epoch)


def joint_mixture(
    audio_video: int, audio: int, video: int, seed: int, *, original: bool = False
) -> Mixture:
    """Audio-video joint training: groups of two audio-video samples, one audio, one video.

    An epoch reads the audio-video source once (the last group of an odd number begins the next
    epoch's); sources are numbered 0, 1, 2 in the order of the arguments.

    Args:
      audio_video, audio, video: records of each source.
      seed: decides the order of each source.
      original: as the original's training does it, its lists are shuffled once and every epoch
        begins at their front again: of audio and video it always reads the same records, half as
        many as there are audio-video samples, and never the others. Without it, the next epoch
        goes on where this one stopped, and a finished source is shuffled anew.
    """
    groups = -(-audio_video // 2)
    sizes = (audio_video, audio, video)
    return Mixture.in_groups(sizes, (0, 0, 1, 2), seed, groups=groups, shuffled_once=original)
