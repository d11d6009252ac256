"""`vllama2 plan`."""

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
    plan.add_argument("--json", action="store_true", help="print one JSON object")
    plan.add_argument("--save-hlo", metavar="FILE", help="keep the compiled program's text")
    plan.add_argument(
        "--published", action="store_true", help="also show the roofline beside measured runs"
    )


def _plan(options) -> int:
    from rich.console import Console

    from vllama2_jax.configs.parse import build
    from vllama2_jax.configs.shortcuts import Shortcuts, resolve
    from vllama2_jax.parallel.topology import topology
    from vllama2_jax.plan.plan import plan, write_json
    from vllama2_jax.plan.tables import show, show_published

    wanted = topology(options.topology)
    shortcuts = Shortcuts(
        model=options.model, batch=options.batch, steps=options.steps, mesh=options.mesh
    )
    config = build(resolve(options.config, shortcuts))
    print(
        f"compiling {config.name} for {wanted.name}; a large model takes minutes", file=sys.stderr
    )
    found = plan(config, wanted, length=options.length, save_hlo=options.save_hlo)
    if options.json:
        print(write_json(found))
    else:
        console = Console(width=None if sys.stdout.isatty() else 120)
        show(found, console)
        if options.published:
            show_published(console)
    return 0 if found.memory.fits else 1
