"""`vllama2 train`, which also writes down what records a process reads for each step.

Started by `test_several_processes.py`. RECORDS names a file that gets a line [step, ids of each
row] per step; STEPS is the run's, so that held-out records are not taken for its own.
"""

import functools
import json
import os
import sys

from vllama2_jax.cli import main
from vllama2_jax.data.pipeline import Feed


def written_down(batches):
    """`Feed.batches`, which also does that."""

    @functools.wraps(batches)
    def wrapped(self, start):
        for batch in batches(self, start):
            if len(self) == int(os.environ["STEPS"]):
                with open(os.environ["RECORDS"], "a", encoding="utf-8") as file:
                    file.write(json.dumps([batch.step, batch.records]) + "\n")
            yield batch

    return wrapped


if __name__ == "__main__":
    Feed.batches = written_down(Feed.batches)
    sys.exit(main(sys.argv[1:]))
