"""The Colab notebooks run from top to bottom."""

import importlib.metadata
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert not any(output.output_type == "error" for output in printed)
    assert any("image/png" in output.get("data", {}) for output in printed), "no picture is shown"
    text = "".join(output.get("text", "") for output in printed)
    answers = re.findall(r"->  (.*)  \(taught: (.*)\)$", text, re.MULTILINE)
    assert all(answer == taught for answer, taught in answers), text
    assert answers or path.stem != "train_your_own"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_installs_from_the_projects_address(path):
    home = importlib.metadata.metadata("vllama2_jax")["Home-page"]
    sources = "".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    assert f"git+{home}" in sources


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
