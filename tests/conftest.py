"""What the tests share: where the oracles and the optional real clips lie."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]


def _allow_timm_beside_cpu_torch():
    """Make `import timm` work where torchvision's compiled half does not fit CPU torch.

    timm imports torchvision, which registers fake kernels for operators that its compiled library
    would define; without that library the registration raises. timm's networks use none of them.
    Both lie in `.venv/oracle`, apart from the environment that users get (see the Makefile).
    """
    for folder in (Path(sys.prefix) / "oracle",):
        if folder.is_dir():
            sys.path.append(str(folder))
    try:
        import torch.library
    except ImportError:
        return
    register = torch.library.register_fake

    def register_fake(op, *args, **kwargs):
        if isinstance(op, str) and op.startswith("torchvision::"):
            return lambda func: func
        return register(op, *args, **kwargs)

    torch.library.register_fake = register_fake


_allow_timm_beside_cpu_torch()


@pytest.fixture(scope="session")
def real_media() -> Path:
    """The folder of real clips; the test is skipped where it is absent."""
    folder = ROOT.parent / "shared" / "media"
    if not folder.is_dir():
        pytest.skip("no real clips beside this checkout")
    return folder


@pytest.fixture(scope="session")
def libtpu():
    """Skips where programs cannot be compiled for TPUs."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
