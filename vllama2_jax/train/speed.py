"""How fast a run is: tokens, samples and FLOPs per second, and the share of the device's peak."""

import collections
from collections.abc import Hashable


class Speed:
    """Rates over the last steps, without those that compile.

    A rate is the sum of what was done over the sum of the time it took, so that a slow step counts
    for as long as it lasted. The first steps of every shape are left out: they wait for a program.
    """

    def __init__(self, *, peak_flops: float | None = None, window: int = 20, skip: int = 1):
        """Begin with nothing measured.

        Args:
          peak_flops: per second, of all devices together (`flops.peak_flops` times their number);
            None leaves utilisation out.
          window: steps that a rate is over.
          skip: first steps of every shape that do not count.
        """
        self._peak = peak_flops
        self._skip = skip
        self._taken: collections.Counter = collections.Counter()
        self._window: collections.deque = collections.deque(maxlen=window)

    def update(
        self,
        *,
        tokens: float,
        samples: float,
        seconds: float,
        model_flops: float,
        slots: float | None = None,
        shape: Hashable = None,
    ) -> dict[str, float]:
        """Count one step.

        Args:
          tokens: slots that are not padding.
          samples: records.
          seconds: that the step took, waiting for its data included.
          model_flops: of `flops.step_flops`, which counts padding as well as tokens.
          slots: of the batch, padding too; None leaves the useful fraction out.
          shape: of its batch, such as the bucket's length; each is compiled when it is first met.

        Returns:
          `tokens_per_second`, `samples_per_second` and `model_flops_per_second`, and with a known
          peak `utilisation`, between 0 and 1; with `slots` also `useful_fraction`, the share of
          them that are tokens. Nothing before the first step that counts.
        """
        self._taken[shape] += 1
        if self._taken[shape] > self._skip:
            self._window.append((tokens, samples, model_flops, slots or 0, seconds))
        tokens, samples, flops, slots, seconds = map(sum, zip((0,) * 5, *self._window, strict=True))
        if not seconds:
            return {}
        rates = {
            "tokens_per_second": tokens / seconds,
            "samples_per_second": samples / seconds,
            "model_flops_per_second": flops / seconds,
        }
        if self._peak:
            rates["utilisation"] = flops / seconds / self._peak
        if slots:
            rates["useful_fraction"] = tokens / slots
        return rates
