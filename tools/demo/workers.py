"""Gradients of one batch from several single-threaded processes that share the weights.

On a busy CPU processes that each work through their own pieces lose less time than one operation
split over several threads, which waits for the slowest thread at every step.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Generic, TypeVar

import torch
import torch.multiprocessing
from torch import Tensor, nn

Piece = TypeVar("Piece")


class Workers(Generic[Piece]):
    """This process and its forked helpers: weights in common, gradients of their own."""

    def __init__(
        self, model: nn.Module, count: int, loss: Callable[[nn.Module, Piece], Tensor]
    ) -> None:
        self._model = model
        self._loss = loss
        self._helpers = [self._fork() for _ in range(count - 1)]

    def _fork(self) -> tuple[Connection, list[Tensor]]:
        context = torch.multiprocessing.get_context("fork")
        self._model.share_memory()
        gradients = [torch.zeros_like(p).share_memory_() for p in self._model.parameters()]
        here, there = context.Pipe()
        arguments = (self._model, gradients, self._loss, there, here)
        context.Process(target=_serve, args=arguments, daemon=True).start()
        there.close()
        return here, gradients

    def accumulate(self, pieces: Sequence[Piece]) -> float:
        """Add the gradient of the mean loss over `pieces` to the model's; gives that mean."""
        count = 1 + len(self._helpers)
        for index, (connection, _) in enumerate(self._helpers, 1):
            connection.send((pieces[index::count], len(pieces)))
        if self._helpers:
            with _one_thread():
                mean = _accumulate(self._model, self._loss, pieces[::count], len(pieces))
        else:
            mean = _accumulate(self._model, self._loss, pieces, len(pieces))
        own = [p.grad for p in self._model.parameters() if p.grad is not None]
        for connection, gradients in self._helpers:
            mean += connection.recv()
            torch._foreach_add_(own, gradients)
        return mean


def _accumulate(
    model: nn.Module,
    loss: Callable[[nn.Module, Piece], Tensor],
    pieces: Sequence[Piece],
    total: int,
) -> float:
    found = 0.0
    for piece in pieces:
        value = loss(model, piece) / total
        value.backward()
        found += float(value.detach())
    return found


def _serve(
    model: nn.Module,
    gradients: Sequence[Tensor],
    loss: Callable[[nn.Module, Piece], Tensor],
    connection: Connection,
    unused: Connection,
) -> None:
    """A helper's life: until the connection closes, answer every share of a batch."""
    os.setsid()  # an interrupt reaches the trainer alone, which then saves and ends
    unused.close()
    torch.set_num_threads(1)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = gradient
    while True:
        try:
            pieces, total = connection.recv()
        except EOFError:
            return
        torch._foreach_zero_(list(gradients))
        connection.send(_accumulate(model, loss, pieces, total))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
