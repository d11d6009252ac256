"""`vllama2 ask` and `vllama2 chat`."""

import dataclasses
import json
import os
import sys

_MODALITIES = ("auto", "video", "image", "audio", "av", "text")
# Fields of media.Limits, which its errors name.
_LIMITS = {
    "max_bytes": "refuse larger files",
    "max_pixels": "refuse frames of more pixels",
    "max_frames": "refuse more distinct frames",
    "max_sound_seconds": "refuse longer sound tracks",
    "max_seconds": "give up on a file after so long",
}


def add_ask(command) -> None:
    """Add `ask`; `command` is of `cli.main`."""
    ask = command("ask", _ask, "answer a question about a video, an image or sound")
    ask.add_argument("media", help="a video, an image, a sound file or a folder of frames")
    ask.add_argument("question")
    _model_options(ask)
    _media_options(ask)
    _sampling_options(ask)
    ask.add_argument("--json", action="store_true", help="print one JSON object")
    ask.add_argument("--stream", action="store_true", help="print the answer as it comes")
    ask.add_argument("--frames", metavar="PNG", help="save a picture of the frames looked at")


def add_chat(command) -> None:
    """Add `chat`; `command` is of `cli.main`."""
    chat = command("chat", _chat, "ask one question after another about a file")
    chat.add_argument("media", help="a video, an image, a sound file or a folder of frames")
    _model_options(chat)
    _media_options(chat)
    _sampling_options(chat)


def _model_options(parser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="tiny",
        help="tiny, a directory, a published name (2.1-7B-16F), or a hub id (%(default)s)",
    )
    group.add_argument("--dtype", help="float32 or bfloat16 (by default what suits the device)")
    group.add_argument(
        "--mesh",
        metavar="SIZES",
        help="split the model over all devices, as in fsdp+tensor:tensor=-1,fsdp=1",
    )
    group.add_argument("--preset", choices=("reference", "paper"), help="how media are read")


def _media_options(parser) -> None:
    group = parser.add_argument_group("media")
    group.add_argument("--modality", default="auto", choices=_MODALITIES, help="what to take in")
    group.add_argument("--start", type=float, metavar="S", help="second to begin at")
    group.add_argument("--end", type=float, metavar="S", help="second to end at")
    group.add_argument("--num-frames", type=int, metavar="N", help="frames to look at")
    for name, words in _LIMITS.items():
        option = f"--{name.replace('_', '-')}"
        kind = float if name.endswith("seconds") else int
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
        model = load(
            options.model, options.dtype, options.preset, mesh=options.mesh, progress=progress
        )
    raised = {name: value for name in _LIMITS if (value := getattr(options, name)) is not None}
    model.limits = dataclasses.replace(model.limits, **raised)
    return model


def _chosen(options) -> tuple[dict, dict]:
    media = dict(
        modality=options.modality,
        start=options.start,
        end=options.end,
        num_frames=options.num_frames,
        seed=options.seed,
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
    clip, sound = session.media.clip, session.media.sound
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
            "sound_seconds": [] if sound is None else _stretches(sound),
        }
        print(json.dumps(record, ensure_ascii=False))
    else:
        print("" if options.stream else answer)


def _seconds(clip) -> list[float | None]:
    return [None if time != time else round(float(time), 3) for time in clip.times]


def _stretches(sound) -> list[list[float]]:
    return [[round(first, 3), round(last, 3)] for first, last in sound.heard]


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
