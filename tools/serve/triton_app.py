"""A bundle behind NVIDIA Triton, by PyTriton: HTTP and gRPC, on the CPU.

    python -m blockcache.tools.serve.triton_app BUNDLE --slots 8

It listens on 127.0.0.1. The model is called ``pictures``; its input ``request`` is JSON, as for
``ray_app``, its outputs are ``image``, uint8 [H, W, 3], and ``answer``, JSON without the picture.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from pytriton.exceptions import PyTritonRuntimeError
from pytriton.model_config import ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

from blockcache.runtime import BatchedPipeline
from blockcache.tools.report.errors import one_line_errors
from blockcache.tools.serve.requests import details_of, message_of, read_request

MODEL = "pictures"


class Pictures:
    """Draws what PyTriton hands over; as many calls run at a time as there are slots."""

    def __init__(self, pipeline: BatchedPipeline) -> None:
        self._pipeline = pipeline

    def __call__(self, requests: Sequence[Any]) -> list[dict[str, np.ndarray]]:
        """Answer requests, each a mapping of input tensors; without batching there is one."""
        try:
            asked = [read_request(request["request"].item()) for request in requests]
            futures = [self._pipeline.submit(**each.arguments) for each in asked]
            pictures = [future.result() for future in futures]
        except Exception as error:
            raise PyTritonRuntimeError(message_of(error)) from None
        return [
            {
                "image": picture.image,
                "answer": np.array([json.dumps(details_of(picture)).encode()]),
            }
            for picture in pictures
        ]


def main(
    bundle: Annotated[Path, typer.Argument(help="With text encoders and decoder.")],
    slots: Annotated[int, typer.Option(min=1, help="Pictures at a time.")] = 8,
    preset: Annotated[list[str] | None, typer.Option(help="Repeatable, the default first.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of the engines.")] = 1,
    drain_seconds: Annotated[int, typer.Option(min=0, help="For what runs at SIGTERM.")] = 60,
    host: Annotated[str, typer.Option(help="Where it listens.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    grpc_port: Annotated[int, typer.Option(min=1, max=65535)] = 8001,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535)] = 8002,
) -> None:
    """Serve until SIGTERM or SIGINT; then finish what runs."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # PyTriton stops at a SIGINT
    config = TritonConfig(
        http_address=host,
        grpc_address=host,
        metrics_address=host,
        http_port=http_port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        exit_timeout_secs=drain_seconds,
    )
    opened = BatchedPipeline.open(bundle, slots=slots, presets=preset, threads=threads)
    with opened as pipeline, Triton(config=config) as server:
        pipeline.warm_up()
        server.bind(
            model_name=MODEL,
            infer_func=[Pictures(pipeline) for _ in range(slots)],  # each serves one at a time
            inputs=[Tensor(name="request", dtype=bytes, shape=(1,))],
            outputs=[
                Tensor(name="image", dtype=np.uint8, shape=(-1, -1, 3)),
                Tensor(name="answer", dtype=bytes, shape=(1,)),
            ],
            config=ModelConfig(batching=False),
        )
        server.serve()


if __name__ == "__main__":
    with one_line_errors():
        typer.run(main)
