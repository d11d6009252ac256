"""A stand-in for gcloud: writes down what it was told and answers as the real one does.

The folder $FAKE_CLOUD holds calls.jsonl (one list of arguments a call), cloud.json (below), and
workers/NODE-WORKER, the home folders of the machines, where commands for them are run by bash.

cloud.json:
  workers   of each slice
  requests  name -> {"states": [...], "nodes": [...]}; each look at a queued resource takes one
            state off the list, but the last
  nodes     name -> state
  on_create what states a queued resource goes through
  fail      {"verb": message}: calls of that verb fail
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

CLOUD = Path(os.environ["FAKE_CLOUD"])
GROUPS = ("queued-resources", "tpu-vm")


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
    if verb in cloud["fail"]:
        refuse(cloud["fail"][verb])
    assert flags["project"] and flags["zone"] and "quiet" in flags
    if verb in ("ssh", "scp"):
        sys.exit(on_machines(cloud, group, verb, words, flags))
    code = {"create": create, "describe": describe, "delete": delete}[verb](
        cloud, group, words[0], flags
    )
    (CLOUD / "cloud.json").write_text(json.dumps(cloud))
    sys.exit(code)


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
        for worker in range(cloud["workers"]):
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
        print(cloud["nodes"][name])
        return
    if name not in cloud["requests"]:
        refuse(f"NOT_FOUND: Resource '{name}' was not found")
    states = cloud["requests"][name]["states"]
    print(states.pop(0) if len(states) > 1 else states[0])


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
    name = words[-1].rstrip(":") if verb == "scp" else words[0]
    nodes = cloud["requests"][name]["nodes"] if group == "queued-resources" else [name]
    if group == "queued-resources" and flags["node"] != "all":
        nodes = [nodes[int(flags["node"])]]
    workers = range(cloud["workers"])
    if flags["worker"] != "all":
        workers = [int(flags["worker"])]
    code = 0
    for node in nodes:
        if cloud["nodes"].get(node) != "READY":
            refuse(f"{node} cannot be reached")
        for worker in workers:
            home = CLOUD / "workers" / f"{node}-{worker}"
            if verb == "scp":
                shutil.copy(words[0], home)
                continue
            environment = {**os.environ, "HOME": str(home), "FAKE_WORKER": f"{node}-{worker}"}
            # As gcloud does: split at blanks, and joined with blanks by ssh.
            command = " ".join(flags["command"].split(" "))
            done = subprocess.run(["bash", "-c", command], cwd=home, env=environment)
            code = code or done.returncode
    return code


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:  # the real one ends like this
        sys.exit(1)
