"""`vllama2 train`."""

import os
import sys
from pathlib import Path


def add_train(command) -> None:
    """Add `train`; `command` is of `cli.main`."""
    train = command("train", _train, "train a model on records, or go on with a run")
    train.epilog = "docs/train_your_own.md shows the whole way."
    train.add_argument("--out", metavar="RUN", help="its folder; an existing run is continued")
    train.add_argument(
        "--model", help="what to begin with: tiny, a directory, a run, a published name (tiny)"
    )
    train.add_argument("--data", metavar="FILE", help="records: a .json list, .jsonl, or a pack")
    train.add_argument(
        "--media-root", metavar="DIR", help="what their paths are relative to (the folder of FILE)"
    )
    train.add_argument("--validation", metavar="FILE", help="held-out records")
    length = train.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="how many to take")
    length.add_argument("--epochs", type=int, metavar="N", help="how often to read the data")
    train.add_argument("--batch", type=int, metavar="N", help="rows of a step")
    train.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints")
    train.add_argument(
        "--lora",
        type=int,
        metavar="RANK",
        help="train adapters on the decoder, and the connectors that the recipe trains",
    )
    train.add_argument("--workers", type=int, metavar="N", help="processes that decode; 0 is none")
    train.add_argument(
        "--mesh",
        metavar="SIZES",
        help="layout and parts over devices, as in fsdp+tensor:tensor=4,fsdp=-1 (fsdp over all)",
    )
    train.add_argument(
        "--programs",
        metavar="DIR",
        help="take compiled programs from here and keep them here, as `plan --save-programs` does; "
        "all processes must see it",
    )
    train.add_argument("--seed", type=int, help="of new parameters and of every order")
    train.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="WHAT",
        help="config:RECIPE (video_sft, av_joint, tiny_av_joint, ...), then fiddler:NAME "
        "and set:FIELD=VALUE, as often as you like; what is not named above is the recipe's",
    )
    train.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps for XProf")
    train.add_argument("--dry-run", action="store_true", help="say what would be done, and stop")


def _train(options) -> int:
    _take_huge_pages()
    from vllama2_jax.configs.parse import build
    from vllama2_jax.configs.shortcuts import Shortcuts, resolve

    names = (field for field in Shortcuts.__dataclass_fields__)
    shortcuts = Shortcuts(**{name: getattr(options, name) for name in names})
    config = build(resolve(options.config, shortcuts))
    window = _window(options.profile)
    if options.dry_run:
        from vllama2_jax.train.dry_run import dry_run

        dry_run(config)
        return 0
    if not options.out:
        raise ValueError("--out is missing: the folder that the run is kept in")
    if not options.data:
        names = ", ".join(source.name for source in config.data.sources)
        print(f"no --data: {config.name} reads its own ({names})", file=sys.stderr)
    from vllama2_jax.parallel import hosts
    from vllama2_jax.train.run import run
    from vllama2_jax.train.run_folder import FAULTS

    done = run(config, options.out, window, options.programs)
    if done.faults:
        print(
            f"{done.faults} records could not be read and were left out; "
            f"{options.out.rstrip('/')}/{FAULTS} says why",
            file=sys.stderr,
        )
    if done.stopped_by is not None:
        print(
            f"stopped by {done.stopped_by.name} behind step {done.step} of {done.steps}; the same "
            "command goes on from there",
            file=sys.stderr,
        )
        return 128 + done.stopped_by
    if hosts.is_first():
        print(f"{done.steps} steps done; ask it: vllama2 ask VIDEO QUESTION --model {options.out}")
    return 0


def _window(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 0
    first, _, last = text.partition(":")
    try:
        window = int(first), int(last or first)
    except ValueError:
        window = 0, 0
    if not 1 <= window[0] <= window[1]:
        raise ValueError(f"--profile {text}: must be FIRST:LAST, step numbers counted from 1")
    return window


def _take_huge_pages() -> None:
    """Start this command again with memory in huge pages, where nobody has chosen otherwise.

    Training steps on a CPU take and give back hundreds of megabytes each; with pages of 4 KiB a
    third of the time goes into that (docs/results/cpu.md). glibc reads the setting only when a
    process starts.
    """
    started = Path(sys.argv[0])
    is_command = started.stem == "vllama2" or started.parent.name == "cli"
    if sys.platform == "linux" and is_command and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
