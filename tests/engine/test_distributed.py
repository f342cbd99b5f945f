"""Processes that torchrun starts: how they join, and what they wait for."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from farms_fast.engine import distributed
from farms_fast.engine.distributed import Ranks, torchrun_group


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process as the first of two that torchrun has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in {**values, "TORCHELASTIC_RUN_ID": "test"}.items():
        monkeypatch.setenv(name, str(value))
    return monkeypatch


def test_a_process_that_never_joins_ends_the_others(launched: pytest.MonkeyPatch) -> None:
    launched.setattr(distributed, "_JOINING", timedelta(seconds=0.5))
    with (
        pytest.raises(TimeoutError, match="torchrun: expected all 2 processes to join within"),
        torchrun_group(),
    ):
        pass
    assert not dist.is_initialized()


def test_those_that_joined_wait_as_long_as_the_work_takes(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("WORLD_SIZE", "1")
    with torchrun_group() as group:
        assert Ranks.of(group) == Ranks(0, 1, group)
        assert group is not None
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(days=2)
    assert not dist.is_initialized()
    assert distributed._JOINING.total_seconds() < 60
