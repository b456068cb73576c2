"""A bundle in Triton's Python backend: requests come when they come, and are answered when done."""

from __future__ import annotations

import functools
import json
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from blockcache.runtime import BatchedPipeline, BlockCacheError, PictureFuture
from blockcache.tools.serve.requests import details_of, message_of, read_request


class TritonPythonModel:
    """What the backend looks for, by this name."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle; Triton is ready when it has drawn a first picture."""
        given = json.loads(args["model_config"])["parameters"]
        value = {name: each["string_value"] for name, each in given.items()}
        self._pipeline = BatchedPipeline.open(
            value["bundle"],
            slots=int(value["slots"]),
            queue=int(value["queue"]),
            threads=int(value["threads"]),
        )
        self._pipeline.warm_up()

    def execute(self, requests: list[Any]) -> None:
        """Submit what came, and return: the next may join what runs."""
        for request in requests:
            sender = request.get_response_sender()
            tensor = pb_utils.get_input_tensor_by_name(request, "request")
            try:
                asked = read_request(tensor.as_numpy().item())
                future = self._pipeline.submit(**asked.arguments)
            except BlockCacheError as error:
                _send(sender, _error(error))
            else:
                future.add_done_callback(functools.partial(_answer, sender))

    def finalize(self) -> None:
        """Finish what runs."""
        self._pipeline.close()


def _answer(sender: Any, done: PictureFuture) -> None:
    error = done.exception()
    if error is not None:
        _send(sender, _error(error))
        return
    picture = done.result()
    answer = np.array([json.dumps(details_of(picture)).encode()], np.object_)
    tensors = [pb_utils.Tensor("image", picture.image), pb_utils.Tensor("answer", answer)]
    _send(sender, pb_utils.InferenceResponse(tensors))


def _error(error: BaseException) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message_of(error)))


def _send(sender: Any, response: Any) -> None:
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
