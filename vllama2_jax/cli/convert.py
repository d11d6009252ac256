"""`vllama2 convert`."""


def add_convert(command) -> None:
    """Add `convert`; `command` is of `cli.main`."""
    convert = command("convert", _convert, "write a checkpoint or a run in another layout")
    convert.add_argument("src", metavar="SRC", help="a checkpoint's or run's directory, name or id")
    convert.add_argument("dst", metavar="DST", help="a new directory")
    convert.add_argument(
        "--to",
        default="orbax",
        choices=("orbax", "hf"),
        help="a saved model of ours, or the released Hugging Face layout (%(default)s)",
    )
    convert.add_argument("--dtype", default="bfloat16", help="of the saved arrays (%(default)s)")


def _convert(options) -> None:
    from vllama2_jax.checkpoints import CheckpointError, save_model
    from vllama2_jax.checkpoints.store import float_dtype, place
    from vllama2_jax.convert.export import export_huggingface
    from vllama2_jax.data.files import is_remote
    from vllama2_jax.progress import bar
    from vllama2_jax.text import tokenizer_files
    from vllama2_jax.weights import find, read

    target, dtype = place(options.dst), float_dtype(options.dtype)
    if options.to == "hf" and is_remote(target):
        raise CheckpointError(f"{target}: this layout is written locally; copy it afterwards")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists and is not empty; choose another directory")
    with bar("reading", unit="tensors") as progress:
        params, card, folder = read(find(options.src), dtype, scan_layers=True, progress=progress)
    files = tokenizer_files(folder)
    if options.to == "hf":
        with bar("writing", unit="tensors") as progress:
            export_huggingface(target, params, card, files, dtype=dtype, progress=progress)
    else:
        save_model(target, params, card, files)
    print(f"{card.config.name} saved in {target}")
