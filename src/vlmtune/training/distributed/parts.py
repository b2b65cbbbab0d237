"""An optimizer's state in slices: each process writes its own, any number of processes reads them.

PyTorch's distributed checkpoint on its safetensors storage: where a slice lies in its tensor stands
in the header of each file, so that nothing is pickled.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

FOLDER = "optimizer"


@dataclass(frozen=True)
class Slices:
    """Copies of this process's slices in the memory of the CPU, and who writes with it.

    Attributes:
        tensors: Slices by name.
        group: Connections of their own, so that training goes on while they are written.
    """

    tensors: dict[str, Tensor]
    group: Any

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], group: Any) -> Self:
        """Copy slices; all processes must ask."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor

        mesh = DeviceMesh.from_group(group, "cpu")
        copies: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if isinstance(tensor, DTensor):
                copies[name] = DTensor.from_local(
                    tensor.to_local().to("cpu", copy=True),
                    mesh,
                    tensor.placements,
                    run_check=False,
                    shape=tensor.shape,
                    stride=tensor.stride(),
                )
            else:
                copies[name] = tensor.to("cpu", copy=True).reshape(1)  # Adam's counter of steps
        return cls(copies, group)


def write_parts(slices: Slices, checkpoint: Path) -> None:
    """Write slices into a checkpoint's folder; returns when all processes have written theirs."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(checkpoint / FOLDER), save_distributed=True)
    try:
        save(slices.tensors, storage_writer=writer, process_group=slices.group)
    except CheckpointException as error:  # of whichever process, told to all
        causes = "; ".join(str(cause) for cause, _ in error.failures.values())
        raise OSError(f"a process could not write its slices: {causes}") from error


def read_parts(checkpoint: Path, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Read what this process needs: whole tensors, or its slice where the parameter is a slice.

    Args:
        checkpoint: The checkpoint's folder.
        parameters: What trains, by name.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(checkpoint / FOLDER))
    tensors: dict[str, Tensor] = {}
    for key, stored in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        parameter = parameters.get(key.rsplit("::", 1)[0])
        if parameter is None or key.endswith("::step"):
            tensors[key] = torch.empty(stored.size, dtype=stored.properties.dtype)
        else:
            tensors[key] = torch.empty_like(parameter, dtype=stored.properties.dtype).detach()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each reads for itself
        load(dict(tensors), storage_reader=reader, no_dist=True)
    return {
        key: value.reshape(()) if key.endswith("::step") else value
        for key, value in tensors.items()
    }
