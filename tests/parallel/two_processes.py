"""One of several processes that meet, agree and stop together; run by `test_hosts.py`.

Prints one JSON line of what it found.
"""

import json
import sys

from vllama2_jax.parallel import hosts
from vllama2_jax.parallel.software import software


def outcome(action):
    try:
        return action()
    except hosts.HostsError as error:
        return f"error: {error}"


def main():
    hosts.join(heartbeat_seconds=20)
    import jax

    me = jax.process_index()
    found = {"process": me, "processes": jax.process_count(), "devices": jax.device_count()}
    found["same"] = outcome(lambda: hosts.agree("same", {"steps": 3}))
    found["differs"] = outcome(lambda: hosts.agree("differs", {"steps": 3, "seed": me}))
    found["software"] = outcome(lambda: hosts.agree("software", software()))
    done = []
    found["first"] = outcome(lambda: hosts.first_does("good", lambda: done.append(me)))
    found["did"] = done

    def fail():
        raise hosts.HostsError("the disk is full")

    found["failed"] = outcome(lambda: hosts.first_does("bad", fail))
    hosts.barrier("meet", 30)
    # The second process is told behind its step 2; each sees the other's steps through barriers,
    # as it would through collectives.
    told = [False]
    agreement = hosts.StopAgreement(lambda: told[0])
    for step in range(1, 20):
        hosts.barrier(f"step {step}", 30)
        told[0] = me == 1 and step >= 2
        if agreement(step):
            break
    found["stopped"] = step
    hosts.barrier("end", 30)
    if me == 0:  # the other one never comes here
        found["alone"] = outcome(lambda: hosts.barrier("alone", 1))
    hosts.barrier("out", 30)
    hosts.new_run()
    agreement = hosts.StopAgreement(lambda: False)
    found["again"] = [
        outcome(lambda: hosts.agree("same", {"steps": 4})),
        outcome(lambda: hosts.agree("differs", {"steps": 4})),
        outcome(lambda: hosts.first_does("bad", lambda: done.append("again"))),
        outcome(lambda: hosts.barrier("end", 30)),
        agreement(5),
    ]
    print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
