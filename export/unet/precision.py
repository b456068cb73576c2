"""A model with its weights in another precision: a new value, the model itself stays as it is.

A copy shares with the model every weight that does not change. So it costs the memory of those
that do, for as long as somebody holds it.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import torch

from blockcache.export.unet.model import TORCH_DTYPES, SourceModel


def converted(model: SourceModel, precision: str) -> SourceModel:
    """The model with weights of type ``precision``, as an export writes them.

    Args:
        model: weights of any floating type.
        precision: float32, float16 or bfloat16.
    """
    return _mapped(model, TORCH_DTYPES[precision])


def rounded(model: SourceModel, precision: str) -> SourceModel:
    """The model with float32 weights whose values are those that ``precision`` can hold.

    What is measured on it is computed in float32, on the weights that the engines will have.

    Args:
        model: weights of any floating type.
        precision: float32, float16 or bfloat16.
    """
    return _mapped(model, TORCH_DTYPES[precision], torch.float32)


def _mapped(model: SourceModel, *dtypes: torch.dtype) -> SourceModel:
    """The model with every floating weight cast to one type after the other."""
    changed: dict[int, torch.Tensor] = {}
    networks = model.call()
    for tensor in itertools.chain(networks.parameters(), networks.buffers()):
        new = tensor.detach()
        for dtype in dtypes if tensor.is_floating_point() else ():
            new = new.to(dtype)
        if new.dtype == tensor.dtype and torch.equal(new, tensor):
            new = tensor
        elif isinstance(tensor, torch.nn.Parameter):
            new = torch.nn.Parameter(new, tensor.requires_grad)
        changed[id(tensor)] = new
    if all(key == id(new) for key, new in changed.items()):
        return model
    # deepcopy looks here first, so it copies the modules and takes these as their weights.
    unet, controlnets = copy.deepcopy((model.unet, model.controlnets), changed)
    return replace(model, unet=unet, controlnets=controlnets)
