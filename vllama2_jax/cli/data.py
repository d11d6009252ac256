"""`vllama2 data ...`: make, check and pack records."""

import argparse
import os
import sys

from vllama2_jax.data.tfio_job import add_job_options, run_job
from vllama2_jax.data.toybox.scenes import MEDIA


def add_data(command) -> None:
    """Add `data` and its kinds; `command` is of `cli.main`."""
    data = command("data", None, "make and check data to train on")
    kinds = data.add_subparsers(dest="kind", required=True, metavar="KIND")
    toybox = command("toybox", _toybox, "render small videos and sounds with questions", kinds)
    toybox.add_argument("dir", metavar="DIR", help="a new directory: train.json, heldout.json")
    toybox.add_argument(
        "--media",
        choices=MEDIA,
        default="all",
        help="videos, sounds, videos with sound that belongs to them, or all (%(default)s)",
    )
    toybox.add_argument("--clips", type=int, default=1000, help="to render (%(default)s)")
    toybox.add_argument("--seed", type=int, default=0)

    check = command("check", _data_check, "look at every record and its media", kinds)
    check.add_argument("file", metavar="FILE", help="a .json list, a .jsonl file or a pack")
    _media_root_option(check)
    check.add_argument("--model", help="count text tokens as training this model would")
    check.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="decoders (%(default)s)"
    )
    check.add_argument("--report", metavar="OUT.json", help="write what is found, as JSON")

    pack = command("pack", _data_pack, "write records and media into ArrayRecord shards", kinds)
    pack.add_argument("file", metavar="FILE", help="a .json list or a .jsonl file")
    pack.add_argument("dst", metavar="DST", help="a new directory")
    _media_root_option(pack)
    pack.add_argument("--report", metavar="JSON", help="of `data check`: leave its quarantine out")

    frames = command("frames", _data_frames, "keep the decoded frames of a small set", kinds)
    frames.add_argument("file", metavar="FILE", help="a .json list, a .jsonl file or a pack")
    frames.add_argument("dst", metavar="DST", help="a new directory, for a source's `frames`")
    _media_root_option(frames)
    frames.add_argument("--model", default="tiny", help="that is to be trained (%(default)s)")
    frames.add_argument(
        "--square-pad",
        action=argparse.BooleanOptionalAction,
        help="as the recipe's data.square_pad (by default not for tiny, and for all others)",
    )
    frames.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="(%(default)s)")

    ingest = command("ingest", run_job, "write TFRecords into ArrayRecord shards", kinds)
    add_job_options(ingest)


def _media_root_option(parser) -> None:
    parser.add_argument(
        "--media-root", metavar="DIR", help="what paths are relative to (the folder of FILE)"
    )


def _toybox(options) -> None:
    from vllama2_jax.data.toybox.families import FAMILIES, FAMILIES_OF
    from vllama2_jax.data.toybox.files import write_toybox
    from vllama2_jax.progress import bar

    families = FAMILIES_OF.get(options.media, FAMILIES)
    with bar("rendering", unit="clips") as progress:
        write_toybox(options.dir, options.clips, options.seed, families=families, progress=progress)
    print(f"{options.clips} clips in {options.dir}: train.json, heldout.json")


def _data_check(options) -> int:
    from etils import epath
    from rich.console import Console

    from vllama2_jax.data.check import check
    from vllama2_jax.data.check_report import write_report
    from vllama2_jax.data.sources import open_source
    from vllama2_jax.progress import bar

    if options.report and not epath.Path(options.report).parent.is_dir():
        raise ValueError(f"{options.report}: its folder is not there; make it, or name another")
    tokenizer = template = None
    if options.model:
        from vllama2_jax.weights import text_rules

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
    report.show(Console(width=None if sys.stdout.isatty() else 120))
    if options.report:
        write_report(options.report, report)
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


def _data_frames(options) -> int:
    import dataclasses

    from vllama2_jax.data.assemble import ClipReader
    from vllama2_jax.data.cache_frames import cache_frames
    from vllama2_jax.data.sources import open_source
    from vllama2_jax.progress import bar
    from vllama2_jax.weights import describe

    card, _ = describe(options.model)
    square_pad = options.model != "tiny" if options.square_pad is None else options.square_pad
    preset = dataclasses.replace(card.preset, square_pad=square_pad)
    reader = ClipReader(card.image, card.config.num_frames, preset, _media_root(options))
    with bar("decoding", unit="clips") as progress:
        done = cache_frames(
            open_source(options.file),
            reader,
            options.dst,
            workers=options.workers,
            progress=progress,
        )
    for line in done.bad:
        print(f"not cached: {line}", file=sys.stderr)
    print(f"{done.clips} clips ({done.bytes} bytes) in {options.dst}; {len(done.bad)} left out")
    return 1 if done.bad else 0


def _media_root(options) -> str:
    return options.media_root or os.path.dirname(options.file) or "."
