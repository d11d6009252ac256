"""The package from the outside: what an import costs, and what the files promise."""

import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def modules_after(statement):
    code = f"{statement}; import sys; print(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import vllama2_jax",
        "import vllama2_jax.cli",
        "import vllama2_jax.media",
        "import vllama2_jax.text",
    ],
)
def test_import_is_lazy(statement):
    loaded = modules_after(statement)
    assert not loaded & {"jax", "flax", "transformers", "torch", "orbax"}


def test_code_of_one_version_is_told_apart_by_its_files(tmp_path):
    from vllama2_jax.version import source_digest

    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.py").write_text("1")
    (tmp_path / "data.json").write_text("1")
    before = source_digest(tmp_path)
    (tmp_path / "data.json").write_text("2")
    assert source_digest(tmp_path) == before
    (tmp_path / "a/x.py").write_text("2")
    changed = source_digest(tmp_path)
    (tmp_path / "a/x.py").rename(tmp_path / "x.py")
    assert len({before, changed, source_digest(tmp_path)}) == 3


def test_public_names_stay_what_they_are_after_every_import():
    """A submodule of the same name would take a function's place as soon as it is imported."""
    import vllama2_jax as vl

    for name in vl.__all__:
        getattr(vl, name)
    names = [m.name for m in pkgutil.iter_modules(vl.__path__)]
    assert not set(names) & set(vl.__all__)
    assert callable(vl.load)


def test_recipes_are_found_in_an_installed_package():
    import importlib.util

    assert importlib.util.find_spec("vllama2_jax.configs") is not None


def test_no_file_is_long():
    files = [*ROOT.glob("vllama2_jax/**/*.py"), *ROOT.glob("tests/**/*.py")]
    assert len(files) > 40
    assert not [str(f) for f in files if len(f.read_text().splitlines()) > 600]
