"""A training state on disk: safetensors only, never half written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from blockcache.runtime.files import replacing

NAME = "checkpoint.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a training run has come."""

    step: int = 0
    spent_s: float = 0.0  # wall time, all runs together


def save(
    folder: Path,
    model: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Write everything `restore` needs, then rename into place."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    tensors |= {f"ema.{name}": p.detach() for name, p in ema.named_parameters()}
    tensors |= _moments(model, optimizer)
    metadata = {"step": str(progress.step), "spent_s": repr(progress.spent_s)}
    with replacing(folder / NAME) as file:
        save_file({k: t.contiguous() for k, t in tensors.items()}, file.name, metadata=metadata)


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        found |= {f"{moment}.{name}": state[moment] for moment in MOMENTS if moment in state}
    return found


def _like(parameter: Tensor, stored: Tensor) -> Tensor:
    """With the parameter's strides: the fused optimizer walks both in memory order."""
    return torch.empty_like(parameter).copy_(stored)


def restore(
    folder: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer
) -> Progress:
    """Fill the modules and the optimizer from the folder's checkpoint, if there is one."""
    path = folder / NAME
    if not path.exists():
        return Progress()
    with safe_open(path, framework="pt") as file, torch.no_grad():
        names = set(file.keys())
        metadata = file.metadata()
        step = int(metadata["step"])
        for prefix, module in (("model", model), ("ema", ema)):
            for name, parameter in module.named_parameters():
                parameter.copy_(file.get_tensor(f"{prefix}.{name}"))
        for name, parameter in model.named_parameters():
            if f"exp_avg.{name}" in names:
                moments = {m: _like(parameter, file.get_tensor(f"{m}.{name}")) for m in MOMENTS}
                optimizer.state[parameter] = {"step": torch.tensor(float(step)), **moments}
    return Progress(step=step, spent_s=float(metadata["spent_s"]))
