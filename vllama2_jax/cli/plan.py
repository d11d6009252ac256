"""`vllama2 plan`."""

import json
import os
import sys


def add_plan(command) -> None:
    """Add `plan`; `command` is of `cli.main`."""
    plan = command("plan", _plan, "does a run fit a pod, how long does it take, what does it send")
    plan.epilog = (
        "Compiles the run's own step for the topology, which need not be here: "
        "vllama2 plan --config=config:video_sft --model 2-8x7B --topology v5p:4x4x4"
    )
    plan.add_argument("--topology", required=True, help="v5p:4x4x4, v5p-128, v5e-256, 2xv5p-128")
    plan.add_argument("--model", help="what to begin with, as in `vllama2 train`")
    plan.add_argument(
        "--data",
        metavar="FILE",
        help="records, to say how full rows are and how many steps it takes",
    )
    plan.add_argument(
        "--media-root", metavar="DIR", help="what their paths are relative to (the folder of FILE)"
    )
    plan.add_argument("--batch", type=int, metavar="N", help="rows of a step")
    plan.add_argument("--steps", type=int, metavar="N", help="how many the run takes")
    plan.add_argument(
        "--mesh", metavar="SIZES", help="layout and parts, as in fsdp+tensor:tensor=4,fsdp=-1"
    )
    plan.add_argument(
        "--length", type=int, metavar="N", help="slots of a row (the recipe's longest rows)"
    )
    plan.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="WHAT",
        help="config:RECIPE, then fiddler:NAME and set:FIELD=VALUE, as in `vllama2 train`",
    )
    plan.add_argument(
        "--search",
        type=int,
        nargs="?",
        const=3,
        metavar="N",
        help="try meshes and batches, and compile until N of them fit (3)",
    )
    plan.add_argument(
        "--estimate", action="store_true", help="compile nothing: formulas alone, within seconds"
    )
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.add_argument("--save-hlo", metavar="FILE", help="keep the compiled program's text")
    plan.add_argument(
        "--published", action="store_true", help="also show the roofline beside measured runs"
    )


def _plan(options) -> int:
    from vllama2_jax.parallel.topology import topology

    wanted = topology(options.topology)
    if wanted.platform == "tpu":  # which are described, not used; without, libtpu looks for one
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from rich.console import Console

    from vllama2_jax.plan.records import with_records
    from vllama2_jax.plan.tables import show, show_published, show_ranked

    ranked = _plans(options, wanted)
    if options.data:
        ranked[0] = with_records(ranked[0])
    if options.json:
        found = [plan.to_json() for plan in ranked]
        print(json.dumps({"plans": found} if options.search else found[0], indent=1))
    else:
        console = Console(width=None if sys.stdout.isatty() else 120)
        if options.search:
            show_ranked(ranked, console)
        show(ranked[0], console)
        if options.published:
            show_published(console)
    return 0 if ranked[0].fits else 1


def _plans(options, wanted) -> list:
    from vllama2_jax.configs.parse import build
    from vllama2_jax.configs.shortcuts import Shortcuts, resolve
    from vllama2_jax.plan.estimate import estimate
    from vllama2_jax.plan.planning import can_compile, plan
    from vllama2_jax.plan.search import search

    names = ("model", "data", "media_root", "batch", "steps", "mesh")
    shortcuts = Shortcuts(**{name: getattr(options, name) for name in names})
    config = build(resolve(options.config, shortcuts))
    if options.search is not None:
        rows = () if options.batch else (2 * config.rows, 4 * config.rows)
        return search(
            config, wanted, rows=rows, length=options.length, most=options.search, told=_say
        )
    if options.estimate or not can_compile(wanted):
        return [estimate(config, wanted, length=options.length)]
    _say(f"compiling {config.name} for {wanted.name}; a large model takes minutes")
    return [plan(config, wanted, length=options.length, save_hlo=options.save_hlo)]


def _say(text: str) -> None:
    print(text, file=sys.stderr)
