"""The `vllama2` command. Heavy imports wait until a subcommand needs them."""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vllama2_jax.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code.

    0: done; 1: done, but something is not as it should be (`data check` has quarantined records,
    `doctor` has found a fault); 2: bad input; 130: interrupted.
    """
    # Quiet by default: XLA's and TensorStore's notes are for their developers.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); that is its right.
        sys.stdout = open(os.devnull, "w")
        return 0
    except Exception as error:
        if options.debug:
            raise
        line = " ".join(str(error).split())
        if not isinstance(error, (ValueError, OSError)) or not line:
            # Not foreseen, so its words alone may not say what happened.
            line = f"{type(error).__name__}: {line} (--debug shows the traceback)"
        print(f"vllama2 {options.command}: {line}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vllama2",
        description="VideoLLaMA 2 in JAX: ask videos, convert and train models.",
    )
    parser.add_argument("--version", action="version", version=f"vllama2 {__version__}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text, under=commands):
        child = under.add_parser(name, help=text, description=text, parents=[shared])
        child.set_defaults(run=run)
        return child

    ask = command("ask", _ask, "answer a question about a video or an image")
    ask.add_argument("media", help="a video, an image or a folder of frames")
    ask.add_argument("question")
    _model_options(ask)
    _media_options(ask)
    _sampling_options(ask)
    ask.add_argument("--json", action="store_true", help="print one JSON object")
    ask.add_argument("--stream", action="store_true", help="print the answer as it comes")
    ask.add_argument("--frames", metavar="PNG", help="save a picture of the frames looked at")

    chat = command("chat", _chat, "ask one question after another about a video or an image")
    chat.add_argument("media", help="a video, an image or a folder of frames")
    _model_options(chat)
    _media_options(chat)
    _sampling_options(chat)

    convert = command("convert", _convert, "turn a released checkpoint into a saved model")
    convert.add_argument("src", metavar="SRC", help="a checkpoint's directory, name or hub id")
    convert.add_argument("dst", metavar="DST", help="a new directory")
    convert.add_argument("--dtype", default="bfloat16", help="of the saved arrays (%(default)s)")

    data = command("data", None, "make and check data to train on")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND")
    toybox = command("toybox", _toybox, "render small videos with questions and answers", kinds)
    toybox.add_argument("dir", metavar="DIR", help="a new directory: train.json, heldout.json")
    toybox.add_argument("--clips", type=int, default=1000, help="to render (%(default)s)")
    toybox.add_argument("--seed", type=int, default=0)

    check = command("check", _data_check, "look at every record and its media", kinds)
    check.add_argument("file", metavar="FILE", help="a .json list, a .jsonl file or a pack")
    _media_root_option(check)
    check.add_argument("--model", help="count text tokens as training this model would")
    check.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="(%(default)s)")
    check.add_argument("--report", metavar="OUT.json", help="write what is found, as JSON")
    pack = command("pack", _data_pack, "write records and media into ArrayRecord shards", kinds)
    pack.add_argument("file", metavar="FILE", help="a .json list or a .jsonl file")
    pack.add_argument("dst", metavar="DST", help="a new directory")
    _media_root_option(pack)
    pack.add_argument("--report", metavar="JSON", help="of `data check`: leave its quarantine out")

    train = command("train", _train, "train a model")
    train.add_argument("--out", required=True, metavar="DIR", help="the run's new directory")
    train.add_argument("--config", default="tiny", help="a recipe's name (%(default)s)")
    train.add_argument("--seed", type=int, default=0)

    command("doctor", _doctor, "check this machine: versions, devices, a known answer")
    return parser


# Fields of media.Limits, which its errors name.
_LIMITS = {
    "max_bytes": "refuse larger files",
    "max_pixels": "refuse frames of more pixels",
    "max_frames": "refuse more distinct frames",
    "max_seconds": "give up on a file after so long",
}


def _media_root_option(parser) -> None:
    parser.add_argument(
        "--media-root", metavar="DIR", help="what paths are relative to (the folder of FILE)"
    )


def _model_options(parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="tiny",
        help="tiny, a directory, a published name (2.1-7B-16F), or a hub id (%(default)s)",
    )
    group.add_argument("--dtype", help="float32 or bfloat16 (by default what suits the device)")
    group.add_argument("--preset", choices=("reference", "paper"), help="how media are read")


def _media_options(parser) -> None:
    group = parser.add_argument_group("media")
    group.add_argument("--modality", default="auto", choices=("auto", "video", "image", "text"))
    group.add_argument("--start", type=float, metavar="S", help="second to begin at")
    group.add_argument("--end", type=float, metavar="S", help="second to end at")
    group.add_argument("--num-frames", type=int, metavar="N", help="frames to look at")
    for name, words in _LIMITS.items():
        option = f"--{name.replace('_', '-')}"
        kind = float if name == "max_seconds" else int
        group.add_argument(option, type=kind, metavar="N", help=words)


def _sampling_options(parser) -> None:
    group = parser.add_argument_group("answer")
    group.add_argument("--max-new-tokens", type=int, metavar="N")
    group.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    group.add_argument("--top-p", type=float, default=0.9, help="(%(default)s)")
    group.add_argument("--top-k", type=int, metavar="K", help="(the checkpoint's own)")
    group.add_argument("--seed", type=int, default=0)


def _load(options):
    from vllama2_jax.loading import load
    from vllama2_jax.progress import bar

    with bar("reading", unit="tensors") as progress:
        model = load(options.model, options.dtype, options.preset, progress=progress)
    raised = {name: value for name in _LIMITS if (value := getattr(options, name)) is not None}
    model.limits = dataclasses.replace(model.limits, **raised)
    return model


def _chosen(options) -> tuple[dict, dict]:
    media = dict(
        modality=options.modality,
        start=options.start,
        end=options.end,
        num_frames=options.num_frames,
    )
    sampling = dict(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )
    return media, sampling


def _check_media(path: str) -> None:
    """Refuse a name that is not there before a model of gigabytes is read."""
    from vllama2_jax.media import MediaError

    if not os.path.exists(path):
        raise MediaError(path, "no such file", "check the path")


def _ask(options) -> None:
    media, sampling = _chosen(options)
    _check_media(options.media)
    model = _load(options)
    session = model.session(options.media, **media)
    clip = session.media.clip
    if options.frames and clip is not None:
        from vllama2_jax.media.sheet import contact_sheet

        contact_sheet(clip).save(options.frames)
    if options.stream and not options.json:
        pieces = []
        for piece in session.stream(options.question, **sampling):
            pieces.append(piece)
            print(piece, end="", flush=True)
        answer = "".join(pieces).strip()
    else:
        answer = session.ask(options.question, **sampling)
    if options.json:
        record = {
            "media": options.media,
            "question": options.question,
            "answer": answer,
            "model": model.config.name,
            "modality": session.media.modality,
            "frame_seconds": [] if clip is None else _seconds(clip),
        }
        print(json.dumps(record, ensure_ascii=False))
    else:
        print("" if options.stream else answer)


def _seconds(clip) -> list[float | None]:
    return [None if time != time else round(float(time), 3) for time in clip.times]


def _chat(options) -> None:
    from vllama2_jax.media.sheet import sketch

    media, sampling = _chosen(options)
    _check_media(options.media)
    session = _load(options).session(options.media, **media)
    if session.media.clip is not None and sys.stdout.isatty():
        print(sketch(session.media.clip))
    print("Ask away; an empty line or Ctrl-D ends.", file=sys.stderr)
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            break
        if not question:
            break
        try:
            for piece in session.stream(question, **sampling):
                print(piece, end="", flush=True)
            print()
        except ValueError as error:  # this question cannot be asked; the next one may be
            print(error, file=sys.stderr)


def _convert(options) -> None:
    from vllama2_jax.checkpoints import CheckpointError, save_model
    from vllama2_jax.loading import find, float_dtype, read
    from vllama2_jax.progress import bar
    from vllama2_jax.text import tokenizer_files

    target = Path(options.dst)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists and is not empty; choose another directory")
    with bar("reading", unit="tensors") as progress:
        params, card, tokenizer = read(
            find(options.src), float_dtype(options.dtype), scan_layers=True, progress=progress
        )
    save_model(target, params, card, tokenizer_files(tokenizer))
    print(f"{card.config.name} saved in {target}")


def _toybox(options) -> None:
    from vllama2_jax.data.toybox import write_toybox
    from vllama2_jax.progress import bar

    with bar("rendering", unit="clips") as progress:
        write_toybox(options.dir, options.clips, seed=options.seed, progress=progress)
    print(f"{options.clips} clips in {options.dir}: train.json, heldout.json")


def _data_check(options) -> int:
    from rich.console import Console

    from vllama2_jax.data.check import check
    from vllama2_jax.data.check_report import write_report
    from vllama2_jax.data.sources import open_source
    from vllama2_jax.progress import bar

    tokenizer = template = None
    if options.model:
        from vllama2_jax.loading import text_rules

        tokenizer, template = text_rules(options.model)
    source = open_source(options.file)
    report = check(
        source,
        _media_root(options),
        tokenizer=tokenizer,
        template=template,
        workers=options.workers,
        bar=bar,
    )
    if options.report:
        write_report(options.report, report)
    report.show(Console(width=None if sys.stdout.isatty() else 120))
    return 1 if report.quarantine else 0


def _data_pack(options) -> None:
    from vllama2_jax.data.check_report import read_report
    from vllama2_jax.data.pack import pack
    from vllama2_jax.data.sources import open_source
    from vllama2_jax.progress import bar

    source, quarantine = open_source(options.file), []
    if options.report:
        quarantine = read_report(options.report, source.fingerprint)["quarantine"]
    left_out = [entry["number"] for entry in quarantine]
    with bar("packing", unit="records") as progress:
        done = pack(
            source, options.dst, _media_root(options), leave_out=left_out, progress=progress
        )
    print(
        f"{done['records']} records with {done['media']} media files ({done['bytes']} bytes) in "
        f"{options.dst}; {len(left_out)} left out"
    )


def _media_root(options) -> str:
    return options.media_root or os.path.dirname(options.file) or "."


def _train(options) -> None:
    _take_huge_pages()
    from vllama2_jax.train.recipes import run

    run(options.config, Path(options.out), seed=options.seed)


def _take_huge_pages() -> None:
    """Start this command again with memory in huge pages, where nobody has chosen otherwise.

    Training steps on a CPU take and give back hundreds of megabytes each; with pages of 4 KiB a
    third of the time goes into that (docs/results/cpu.md). glibc reads the setting only when a
    process starts.
    """
    started_as_a_command = Path(sys.argv[0]).stem in ("vllama2", "cli")
    if sys.platform == "linux" and started_as_a_command and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _doctor(options) -> int:
    from vllama2_jax.doctor import report

    return report()


if __name__ == "__main__":
    sys.exit(main())
