"""What a plan has to know of a device, asked of the device."""

from __future__ import annotations

import os

import torch

from farms_fast.engine.cost import Machine


def machine_of(device: torch.device) -> Machine:
    """The memory of a device, and for the CPU torch's number of threads.

    Args:
        device: the CPU, or a CUDA device that is there.

    Example:
        >>> import torch
        >>> machine_of(torch.device("cpu")).kind
        'cpu'
    """
    if device.type == "cuda":
        return Machine("cuda", memory=torch.cuda.get_device_properties(device).total_memory)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine("cpu", memory=memory, cores=torch.get_num_threads())
