"""`vllama2 plan`."""

import dataclasses
import json
import math
import sys
from pathlib import Path


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
        "--of",
        choices=("train", "prefill", "decode"),
        default="train",
        help="a training step (train), or to answer: reading a batch of prompts, a new token each",
    )
    plan.add_argument(
        "--data",
        metavar="FILE",
        help="records, to say how full rows are and how many steps it takes",
    )
    plan.add_argument(
        "--media-root", metavar="DIR", help="what their paths are relative to (the folder of FILE)"
    )
    plan.add_argument("--batch", type=int, metavar="N", help="rows of a step (8 to answer)")
    plan.add_argument("--new", type=int, metavar="N", help="tokens of an answer (256)")
    plan.add_argument("--steps", type=int, metavar="N", help="how many the run takes")
    plan.add_argument(
        "--mesh",
        metavar="SIZES",
        help="layout and parts, as in fsdp+tensor:tensor=4,fsdp=-1 (to answer: 2d)",
    )
    plan.add_argument(
        "--length",
        type=int,
        metavar="N",
        help="slots of a row (the recipe's longest rows; to answer, a clip and 128 of text)",
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
    plan.add_argument(
        "--save-programs",
        metavar="DIR",
        help="keep the step's programs for `vllama2 train --programs DIR`; needs the data",
    )
    plan.add_argument("--save-hlo", metavar="FILE", help="keep the compiled program's text")


def _plan(options) -> int:
    _check(options)
    from rich.console import Console

    from vllama2_jax.parallel.topology import topology
    from vllama2_jax.plan.tables import show, show_published, show_ranked, show_serving

    wanted = topology(options.topology)
    console = Console(width=None if sys.stdout.isatty() else 120)
    if options.of != "train":
        found = _serving_plan(options, wanted)
        if options.json:
            print(json.dumps(found.to_json(), indent=1))
        else:
            show_serving(found, console)
        return 0 if found.fits else 1
    ranked = _plans(options, wanted)
    if options.json:
        print(json.dumps(_as_json(ranked, bool(options.search)), indent=1))
    else:
        if options.search:
            show_ranked(ranked, console)
        show(ranked[0], console)
        if ranked[0].roofline:
            show_published(console)
    return 0 if ranked[0].fits else 1


def _as_json(ranked, searched: bool) -> dict:
    """One plan, or {"plans": [...]}; with the roofline beside measured runs."""
    from vllama2_jax.parallel.published import published_rows

    said = [plan.to_json() for plan in ranked]
    rows = [dataclasses.asdict(row) for row in published_rows()]
    return ({"plans": said} if searched else said[0]) | {"published": rows}


_OF_TRAINING = ("data", "media_root", "steps", "config", "search", "save_programs")


def _check(options) -> None:
    """Refuse options that cannot be meant."""
    if options.of == "train" and options.new is not None:
        raise ValueError("--new is of answers; say --of prefill or --of decode")
    if options.of != "train" and not options.model:
        raise ValueError(f"--of {options.of} needs --model: which model is to answer")
    strange = [name for name in _OF_TRAINING if getattr(options, name)]
    if options.of != "train" and strange:
        raise ValueError(f"--{strange[0].replace('_', '-')} is of training; leave out --of")
    for name in ("search", "length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    if options.save_hlo and (options.search or options.estimate or options.save_programs):
        raise ValueError("--save-hlo keeps the one program that is compiled; leave out the others")
    if options.save_hlo and not Path(options.save_hlo).absolute().parent.is_dir():
        raise ValueError(f"--save-hlo {options.save_hlo}: no such folder; make it first")
    if options.save_programs and (options.search or options.estimate or options.length):
        raise ValueError(
            "--save-programs compiles all programs of one run; leave out --search, --estimate and "
            "--length"
        )
    if options.search and options.mesh and "dcn" not in options.mesh:
        raise ValueError("--search tries meshes; leave out --mesh, or --search to plan that one")


def _serving_plan(options, wanted):
    from vllama2_jax.parallel.mesh import parse_mesh
    from vllama2_jax.plan.program import network_of
    from vllama2_jax.plan.serving import plan_serving, serving_of
    from vllama2_jax.plan.serving_estimate import estimate_serving
    from vllama2_jax.train.config import StartConfig

    network = network_of(StartConfig(options.model))
    rows = 8 if options.batch is None else options.batch
    new_tokens = 256 if options.new is None else options.new
    serving = serving_of(network, options.of, rows, options.length, new_tokens)
    # As many parts as there are heads of keys to share; the rest splits the other way.
    heads = math.gcd(network.decoder.num_kv_heads, wanted.chips_per_slice)
    mesh = parse_mesh(options.mesh or f"2d:tensor={heads},fsdp=-1")
    if not _compiles(options, wanted):
        return estimate_serving(network, serving, mesh, wanted)
    _say(f"compiling {options.of} of {network.name} for {wanted.name}")
    return plan_serving(network, serving, mesh, wanted, save_hlo=options.save_hlo)


def _plans(options, wanted) -> list:
    """One plan, or those of a search; with what their records say."""
    from vllama2_jax.checkpoints.store import place
    from vllama2_jax.configs.parse import build
    from vllama2_jax.configs.shortcuts import Shortcuts, resolve
    from vllama2_jax.plan.estimate import estimate
    from vllama2_jax.plan.planning import plan, save_programs
    from vllama2_jax.plan.records import records_of
    from vllama2_jax.plan.search import search

    names = ("model", "data", "media_root", "batch", "steps", "mesh")
    shortcuts = Shortcuts(**{name: getattr(options, name) for name in names})
    config = build(resolve(options.config, shortcuts))
    # Records first: what is wrong with them is seen sooner than anything is compiled.
    known = records_of(config) if options.data or options.save_programs else None
    compiling = _compiles(options, wanted)
    if options.save_programs:
        if not compiling:
            raise ValueError(f"{wanted.name}: nothing can be compiled for it here")
        folder = place(options.save_programs)
        return [save_programs(config, wanted, known, folder, told=_say).told(known)]
    if options.search:
        found = search(
            config,
            wanted,
            rows=() if options.batch else (2 * config.rows, 4 * config.rows),
            length=options.length,
            records=known,
            most=options.search if compiling else 0,
            told=_say,
        )
    elif compiling:
        _say(f"compiling {config.name} for {wanted.name}; a large model takes minutes")
        how = dict(length=options.length, save_hlo=options.save_hlo, records=known)
        found = [plan(config, wanted, **how)]
    else:
        found = [estimate(config, wanted, length=options.length, records=known)]
    return [plan.told(known) for plan in found] if known else found


def _compiles(options, wanted) -> bool:
    """Whether a program is compiled, as asked, or formulas stand in for it, since nothing can."""
    from vllama2_jax.plan.planning import can_compile

    if options.estimate or not can_compile(wanted):
        if options.save_hlo:
            raise ValueError(
                f"--save-hlo: nothing can be compiled for {wanted.name} here; plan where such "
                "devices are, or leave it out"
            )
        return False
    return True


def _say(text: str) -> None:
    print(text, file=sys.stderr)
