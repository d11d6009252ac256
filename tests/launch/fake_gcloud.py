"""A stand-in for gcloud: writes down what it was told and answers as the real one does.

The folder $FAKE_CLOUD holds calls.jsonl (one list of arguments a call), cloud.json (below), and
workers/NODE-WORKER, the home folders of the machines, where commands for them are run by bash.

cloud.json:
  workers   node -> how many machines it has
  requests  name -> {"states": [...], "nodes": [...]}; each look at a queued resource takes one
            state off the list, but the last
  nodes     name -> state, or a list of which each look takes one off, but the last
  on_create what states a queued resource goes through
  fail      {"verb": message}: calls of that verb fail; of a list each call takes one off, and null
            is none
  lost      machines (NODE-WORKER) that no connection reaches
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

CLOUD = Path(os.environ["FAKE_CLOUD"])
GROUPS = ("queued-resources", "tpu-vm")
NO_CONNECTION = 255  # of ssh, after ten attempts
UNUSABLE = ("STOPPED", "STOPPING", "DELETING", "HIDDEN", "PREEMPTED", "TERMINATED")


def refuse(message):
    sys.exit(f"ERROR: (gcloud) {message}")


def main(arguments):
    with (CLOUD / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(arguments) + "\n")
    cloud = json.loads((CLOUD / "cloud.json").read_text())
    assert arguments[:2] == ["compute", "tpus"] and arguments[2] in GROUPS, arguments
    group, verb, *rest = arguments[2:]
    words = [word for word in rest if not word.startswith("--")]
    flags = dict(word[2:].partition("=")[::2] for word in rest if word.startswith("--"))
    fail_if_told(cloud, verb)
    assert flags["project"] and flags["zone"] and "quiet" in flags
    if verb in ("ssh", "scp"):
        sys.exit(on_machines(cloud, group, verb, words, flags))
    code = {"create": create, "describe": describe, "delete": delete}[verb](
        cloud, group, words[0], flags
    )
    (CLOUD / "cloud.json").write_text(json.dumps(cloud))
    sys.exit(code)


def fail_if_told(cloud, verb):
    message = cloud["fail"].get(verb)
    if isinstance(message, list):
        message = message.pop(0) if message else None
        (CLOUD / "cloud.json").write_text(json.dumps(cloud))
    if message:
        refuse(message)


def machines(accelerator):
    """How many a slice has: 4 chips each, but up to 8 of v5e and v6e are in one."""
    kind, size = accelerator.split("-")
    if kind in ("v4", "v5p"):
        return int(size) // 2 // 4
    return 1 if int(size) <= 8 else int(size) // 4


def look(states):
    """The state in front of a list, or one that stays."""
    if isinstance(states, str):
        return states
    return states.pop(0) if len(states) > 1 else states[0]


def create(cloud, group, name, flags):
    if name in (cloud["requests"] if group == "queued-resources" else cloud["nodes"]):
        refuse(f"ALREADY_EXISTS: {name}")
    nodes = [flags.get("node-id", name)]
    if "node-count" in flags:
        nodes = [f"{flags['node-prefix']}-{k}" for k in range(int(flags["node-count"]))]
    if group == "queued-resources":
        cloud["requests"][name] = {"states": list(cloud["on_create"]), "nodes": nodes}
    for node in nodes:
        cloud["nodes"][node] = "READY"
        cloud["workers"][node] = machines(flags["accelerator-type"])
        for worker in range(cloud["workers"][node]):
            home = CLOUD / "workers" / f"{node}-{worker}"
            give_up(home)
            home.mkdir(parents=True)


def give_up(home):
    """A machine goes, with its disk; what still runs there writes to where nobody looks."""
    if home.exists():
        lost = CLOUD / "lost"
        lost.mkdir(exist_ok=True)
        home.rename(lost / f"{home.name}-{len(list(lost.iterdir()))}")


def describe(cloud, group, name, flags):
    if group == "tpu-vm":
        if name not in cloud["nodes"]:
            refuse(f"NOT_FOUND: Resource '{name}' was not found")
        print(look(cloud["nodes"][name]))
        return
    if name not in cloud["requests"]:
        refuse(f"NOT_FOUND: Resource '{name}' was not found")
    print(look(cloud["requests"][name]["states"]))


def delete(cloud, group, name, flags):
    if group == "queued-resources":
        request = cloud["requests"].get(name) or refuse("NOT_FOUND")
        left = [node for node in request["nodes"] if node in cloud["nodes"]]
        if left and "force" not in flags:
            refuse(f"the queued resource has nodes: {left}")
        if request["states"][0] == "SUSPENDING":
            refuse("a queued resource cannot be deleted while it is SUSPENDING")
        del cloud["requests"][name]
    else:
        left = [name] if name in cloud["nodes"] else refuse("NOT_FOUND")
    for node in left:
        del cloud["nodes"][node]
        for home in (CLOUD / "workers").glob(f"{node}-*"):
            give_up(home)


def on_machines(cloud, group, verb, words, flags):
    """Run a command, or copy a file.

    As the original: slices of a queued resource that cannot be prepared are left out with a
    warning, if need be all of them, and the exit code tells nothing of it.
    """
    name = words[-1].rstrip(":") if verb == "scp" else words[0]
    if group == "queued-resources":
        if name not in cloud["requests"]:
            refuse(f"NOT_FOUND: Resource '{name}' was not found")
        nodes = cloud["requests"][name]["nodes"]
        if flags["node"] != "all":
            nodes = [nodes[int(flags["node"])]]
    else:
        nodes = [name]
    ready = [node for node in nodes if usable(cloud, node)]
    if ready != nodes:
        if group == "tpu-vm":
            refuse(f"{name} is in an unusable state")
        warning = f"Could not prepare all {len(nodes)} nodes, attempting to ssh into the rest."
        print(f"WARNING: {warning}", file=sys.stderr)
    chosen = [
        f"{node}-{worker}"
        for node in ready
        for worker in range(cloud["workers"][node])
        if flags["worker"] in ("all", str(worker))
    ]
    print(f"Attempting to SSH into {len(ready)} nodes", file=sys.stderr)
    return max([on_machine(cloud, verb, words, flags, machine) for machine in chosen], default=0)


def usable(cloud, node):
    states = cloud["nodes"].get(node, ["DELETING"])
    return (states if isinstance(states, str) else states[0]) not in UNUSABLE


def on_machine(cloud, verb, words, flags, machine):
    """The exit code of a command on one machine."""
    home = CLOUD / "workers" / machine
    if machine in cloud["lost"]:
        return NO_CONNECTION
    if verb == "scp":
        shutil.copy(words[0], home)
        return 0
    environment = {**os.environ, "HOME": str(home), "FAKE_WORKER": machine}
    # As gcloud does: split at blanks, and joined with blanks by ssh.
    command = " ".join(flags["command"].split(" "))
    return subprocess.run(["bash", "-c", command], cwd=home, env=environment).returncode


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:  # the real one ends like this
        sys.exit(1)
