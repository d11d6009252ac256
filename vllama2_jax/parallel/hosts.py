"""The processes of a run: how they find each other, agree, and wait without waiting for ever.

What is agreed here goes through JAX's coordination service, not through the devices, so that it has
deadlines and says who is missing. JAX shows that service, and how it finds processes, under private
names only.
"""

import functools
import hashlib
import importlib.util
import json
import os
import time
from collections.abc import Callable

import jax
from jax._src import clusters, distributed

from vllama2_jax.accelerators import has_tpus

_MINUTE = 60.0
# A process that has died is noticed after this long; the others then end.
_HEARTBEAT_SECONDS = 100

# The service keeps every key for as long as it lives, which may be several runs.
_RUN = 0


class HostsError(ValueError):
    """Processes of one run that do not fit each other, or that do not answer."""


def join(heartbeat_seconds: int = _HEARTBEAT_SECONDS) -> None:
    """Become one of the processes of a run, where the environment says that there are several.

    JAX_COORDINATOR_ADDRESS (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID say so anywhere; Slurm
    and Cloud TPU say it in their own ways, which JAX reads. A machine with TPUs of which nothing is
    said is one process. Must come before anything else of JAX; a second call does nothing.

    Args:
      heartbeat_seconds: after how long a process counts as dead that does not answer.

    Raises:
      HostsError: if the variables are incomplete, or the others cannot be reached.
    """
    if distributed.global_state.client is not None:
        return
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address:
        options = {"coordinator_address": address, **_counted()}
    elif _under_slurm() or _on_tpu_vm():
        options = {}
    else:
        return
    # On CPUs programs would overlap, and Gloo, which has one channel, mix their messages up.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_seconds, **options)
    except Exception as error:
        reason = _first_line(error)
        raise HostsError(
            f"cannot join the other processes{f' at {address}' if address else ''} ({reason}); "
            "start them all with the same JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES, and "
            "JAX_PROCESS_ID counted from 0"
        ) from None


def _counted() -> dict[str, int]:
    found = {}
    for field, name in (("num_processes", "JAX_NUM_PROCESSES"), ("process_id", "JAX_PROCESS_ID")):
        value = os.environ.get(name, "")
        if not value.isdecimal():
            raise HostsError(
                f"JAX_COORDINATOR_ADDRESS is set and {name} is {value or 'missing'}; set it to a "
                "whole number, or unset all three for one process"
            )
        found[field] = int(value)
    return found


def _under_slurm() -> bool:
    tasks = int(os.environ.get("SLURM_NTASKS", "1"))
    if "SLURM_JOB_ID" not in os.environ or tasks == 1:
        return False
    if "SLURM_STEP_NODELIST" not in os.environ:  # the script of a job, or a shell within it
        raise HostsError(
            f"this Slurm job has {tasks} tasks, and this process is none of them; start it with "
            "srun, as launch/slurm_gpu.sbatch does, or unset SLURM_NTASKS for one process"
        )
    return True


def _on_tpu_vm() -> bool:
    wanted = os.environ.get("JAX_PLATFORMS", "tpu").split(",")
    if not has_tpus() or "tpu" not in wanted or importlib.util.find_spec("libtpu") is None:
        return False
    try:
        return clusters.GkeTpuCluster.is_env_present() or clusters.GceTpuCluster.is_env_present()
    except Exception as error:
        reason = _first_line(error)
        raise HostsError(
            f"this machine has TPUs, and its metadata, which names the others, cannot be read "
            f"({reason}); for this machine alone, set TPU_SKIP_MDS_QUERY=1"
        ) from None


def several() -> bool:
    """Whether this run has more than one process."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def new_run() -> None:
    """Begin another run in these processes, each of which must say so; names may be used again."""
    global _RUN
    _RUN += 1


def barrier(name: str, seconds: float = 10 * _MINUTE) -> None:
    """Wait until all processes are here.

    Args:
      name: of the place; used once in a run.
      seconds: how long to wait at most.

    Raises:
      HostsError: if some do not come.
    """
    if not several():
        return
    try:
        distributed.global_state.client.wait_at_barrier(_key(name), int(seconds * 1000))
    except Exception as error:
        reason = _first_line(error)
        raise HostsError(
            f"not all {jax.process_count()} processes reached {name!r} within {seconds:g} s "
            f"({reason}); look at the logs of the others"
        ) from None


def agree(name: str, value: dict, seconds: float = 10 * _MINUTE) -> None:
    """Make sure that all processes hold the same, as they must to run the same program.

    The first process reads a digest of each, and the whole only of one that differs.

    Args:
      name: of what is compared; used once in a run.
      value: plain JSON types.
      seconds: how long to wait for the others.

    Raises:
      HostsError: in all processes, naming what differs between which.
    """
    if not several():
        return
    value = json.loads(json.dumps(value))
    digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    _tell(f"{name}/{jax.process_index()}", value)
    _tell(f"{name}/{jax.process_index()}/digest", {"digest": digest})
    # The others wait longer, so that they hear who is missing.
    compare = functools.partial(_compare, name, value, digest, seconds)
    first_does(f"{name}/compared", compare, seconds + _MINUTE)


def _compare(name: str, value: dict, digest: str, seconds: float) -> None:
    """The first process's part of `agree`."""
    deadline = time.monotonic() + seconds
    for process in range(1, jax.process_count()):
        left = max(deadline - time.monotonic(), 1.0)
        if _hear(f"{name}/{process}/digest", left, process)["digest"] == digest:
            continue
        other = _hear(f"{name}/{process}", left, process)
        differing = sorted(key for key in value | other if value.get(key) != other.get(key))
        key = differing[0]
        raise HostsError(
            f"processes 0 and {process} differ in {', '.join(differing)} ({value.get(key)!r} and "
            f"{other.get(key)!r}); give all of them the same command, code and data"
        )


def first_does(name: str, action: Callable[[], object], seconds: float = 10 * _MINUTE) -> None:
    """Have the first process do something; the others wait, and fail where it fails.

    Args:
      name: of it; used once in a run.
      action: what to do.
      seconds: how long the others wait.

    Raises:
      HostsError: in the other processes, with the first one's reason; it raises its own error.
    """
    if not several():
        action()
        return
    if is_first():
        try:
            action()
        except BaseException as error:
            _tell(name, {"error": str(error) or type(error).__name__})
            raise
        _tell(name, {})
    else:
        failed = _hear(name, seconds, 0).get("error")
        if failed:
            raise HostsError(f"the first process says: {failed}")


class StopAgreement:
    """All processes stop behind the same step when any of them is told to stop.

    Who is told at step k has written so before it takes part in step k + 1, so that every other
    process can read it when that step is done. Where several are told, the earliest counts.
    """

    _AHEAD = 3

    def __init__(self, told: Callable[[], bool]):
        """`told` says whether this process was told to stop."""
        self._told, self._last = told, None

    def __call__(self, step: int) -> bool:
        """Whether a step that was just started is the last one."""
        if not several():
            return self._told()
        client = distributed.global_state.client
        if self._told() and self._last is None:
            self._last = step + self._AHEAD
            _tell(f"stop/{jax.process_index()}", {"step": self._last})
        heard = client.key_value_dir_get(_key("stop/"))
        steps = [json.loads(text)["step"] for _, text in heard]
        return bool(steps) and step >= min(steps)


def _key(name: str) -> str:
    return f"vllama2/{_RUN}/{name}"


def _tell(name: str, value: dict) -> None:
    distributed.global_state.client.key_value_set(_key(name), json.dumps(value))


def _hear(name: str, seconds: float, process: int) -> dict:
    client = distributed.global_state.client
    try:
        return json.loads(client.blocking_key_value_get(_key(name), int(seconds * 1000)))
    except Exception as error:
        reason = _first_line(error)
        raise HostsError(
            f"process {process} did not say its {name.split('/')[0]!r} within {seconds:g} s "
            f"({reason}); look at its log"
        ) from None


def _first_line(error: Exception) -> str:
    """The start of what an error says, which may be pages; its kind where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
