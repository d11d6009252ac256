"""A program that joins a run as on a machine of a Cloud TPU slice, for `test_pod_processes.py`.

What differs from such a machine, and is put in its place here: that there are chips, and what the
machine's metadata service says. Prints one JSON line; touches no backend.
"""

import json
import os
import sys
from pathlib import Path

from jax._src import cloud_tpu_init, distributed
from jax._src.clusters import cloud_tpu_cluster, cluster

from vllama2_jax import accelerators
from vllama2_jax.parallel import hosts


def main(worker: str, workers: int, chips: str) -> None:
    metadata = {
        "agent-worker-number": worker,
        "worker-network-endpoints": ",".join(["localhost"] * workers),
        "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'",
    }
    cloud_tpu_cluster.get_metadata = lambda key: (metadata[key], 200)
    for module in (cloud_tpu_init, cloud_tpu_cluster, cluster):
        module.running_in_cloud_tpu_vm = True
    os.environ.pop("TPU_SKIP_MDS_QUERY", None)  # JAX sets it where it sees no chips
    accelerators.Path = lambda place: Path(chips + place)
    hosts.join()
    found = distributed.global_state
    told = {"process": found.process_id, "processes": found.num_processes}
    told["variables"] = sorted(name for name in os.environ if name.startswith("JAX_"))
    os.write(1, (json.dumps(told) + "\n").encode())
    found.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
