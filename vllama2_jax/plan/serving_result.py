"""What a plan of answering says."""

import dataclasses

from vllama2_jax.parallel.roofline import assumptions
from vllama2_jax.plan.assumptions import SERVING, SERVING_ESTIMATES, SERVING_TRAFFIC
from vllama2_jax.plan.result import ProgramPlan


@dataclasses.dataclass(frozen=True)
class Serving:
    """What is planned.

    Attributes:
      program: "prefill", a batch of prompts, or "decode", a new token of every row.
      rows: that are answered together.
      length: slots of a prompt, a bucket of `infer.buckets`.
      room: for new tokens, as inference makes it.
    """

    program: str
    rows: int
    length: int
    room: int

    @property
    def capacity(self) -> int:
        """Slots of a row's cache."""
        return self.length + self.room


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServingPlan(ProgramPlan):
    """What one of the programs takes on a topology; a step is one run, or one new token.

    Attributes:
      serving: what was asked for.
      cache: bytes of keys and values of each chip, which are among the arguments; and of all rows.
    """

    serving: Serving
    cache: tuple[int, int]

    @property
    def tokens_of_a_step(self) -> int:
        """Of prompts that are read, or of answers that are written."""
        return self.serving.rows * (self.serving.length if self.serving.program == "prefill" else 1)

    @property
    def assumptions(self) -> list[str]:
        """What is taken for granted, one sentence each."""
        of_roofline = ()
        if self.roofline:
            of_roofline = assumptions(self.topology, SERVING_TRAFFIC, self.dtype)
        return [*(SERVING_ESTIMATES if self.estimated else ()), *SERVING, *of_roofline]

    def to_json(self) -> dict:
        """The plan in plain JSON types; keys as of `result.Plan`."""
        serving, found = self.serving, super().to_json()
        found["hbm_bytes_per_chip"]["cache"] = self.cache[0]
        return {
            **found,
            "program": serving.program,
            "batch": {"rows": serving.rows, "length": serving.length, "room": serving.room},
            "stage": None,
        }
