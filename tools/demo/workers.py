"""Gradients of one batch from several single-threaded workers that share the weights.

On a busy CPU two workers that take small pieces as they become free lose less time than one
operation split over two threads, which waits for the slower thread at every step.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Piece = TypeVar("Piece")


class Workers(Generic[Piece]):
    """Replicas of a model with common weights and their own gradients."""

    def __init__(self, model: nn.Module, count: int) -> None:
        self._replicas = [model, *(_replica(model) for _ in range(count - 1))]
        self._parameters = [list(replica.parameters()) for replica in self._replicas]
        self._pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))

    def accumulate(
        self, pieces: Sequence[Piece], loss: Callable[[nn.Module, Piece], Tensor]
    ) -> float:
        """Put the gradient of the mean loss over `pieces` into the model; gives that mean."""
        waiting = deque(pieces)

        def work(replica: nn.Module) -> float:
            total = 0.0
            while True:
                try:
                    piece = waiting.popleft()
                except IndexError:
                    return total
                value = loss(replica, piece) / len(pieces)
                value.backward()
                total += float(value.detach())

        totals = list(self._pool.map(work, self._replicas))
        self._gather()
        return sum(totals)

    def _gather(self) -> None:
        main = self._parameters[0]
        for others in self._parameters[1:]:
            for parameter, other in zip(main, others, strict=True):
                if other.grad is None:
                    continue
                if parameter.grad is None:
                    parameter.grad = other.grad
                else:
                    parameter.grad += other.grad
                other.grad = None


def _replica(model: nn.Module) -> nn.Module:
    replica = copy.deepcopy(model)
    for parameter, original in zip(replica.parameters(), model.parameters(), strict=True):
        parameter.data = original.data
    return replica
