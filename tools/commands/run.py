"""``blockcache run``: prompts to pictures or latents with a bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from blockcache.tools.commands.options import (
    AsJson,
    BackendName,
    BundleFolder,
    ModelName,
    PresetName,
    Threads,
)

if TYPE_CHECKING:
    import numpy as np

    from blockcache.runtime import Bundle
    from blockcache.tools.sources.codecs import Codec


OUTPUTS = (".png", ".npy")
"""What ``--out`` may be: a picture, or latents."""


def run(
    bundle: BundleFolder,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw; repeatable, one image each.")
    ] = None,
    model: ModelName = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(help="Encoded prompts instead (safetensors, as for compile --calibration)."),
    ] = None,
    preset: PresetName = None,
    seed: Annotated[int, typer.Option(help="Image i uses SEED + i.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Default: the preset's.")] = None,
    guidance_rescale: Annotated[
        float, typer.Option(help="0 (off) to 1: keep strong guidance from burning out colours.")
    ] = 0.0,
    height: Annotated[int | None, typer.Option(help="Latent height; default the model's.")] = None,
    width: Annotated[int | None, typer.Option(help="Latent width; default the model's.")] = None,
    out: Annotated[
        Path, typer.Option(help="FILE.png: a grid of pictures; FILE.npy: latents [N, C, H, W].")
    ] = Path("out.png"),
    backend: BackendName = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Denoise prompts by a bundle's preset and write pictures.

    Example: blockcache run demo-out/bundle --prompt "twitter emoji, red apple" --out apple.png
    """
    from blockcache.runtime import Bundle, Session
    from blockcache.runtime.engines.choice import make_backend
    from blockcache.tools.commands.names import preset_of
    from blockcache.tools.commands.outputs import check_file
    from blockcache.tools.report.progress import StageProgress

    check_file(out, OUTPUTS)
    opened = Bundle.open(bundle)
    name = preset_of(opened, preset)
    engines = make_backend(backend, threads=threads, bundle=opened, verify=False)
    codec = _codec(opened, model, embeddings, out)
    sizes = opened.model.sizes
    size = (height or sizes.height, width or sizes.width)
    positive, negative = _conditions(codec, embeddings, prompt, size)
    session = Session.open(opened, preset=name, backend=engines)
    images = max(len(values) for values in positive.values())
    seeds = range(seed, seed + images)
    with StageProgress() as progress:
        result = session.denoise(
            session.noise(seeds, *size),
            positive.pop("encoder_hidden_states"),
            negative.pop("encoder_hidden_states", None),
            conditions=positive,
            negative_conditions=negative,
            guidance_scale=guidance,
            guidance_rescale=guidance_rescale,
            seeds=seeds,
            callback=lambda at: progress(f"denoise {name}", at.step + 1, at.steps),
        )
    _write(result.latents, codec, out)
    print(f"wrote {out}", file=sys.stderr)
    facts = {"preset": name, "images": images, "out": str(out), **result.record.summary()}
    print(json.dumps(facts) if as_json else "  ".join(f"{k} {v}" for k, v in facts.items()))


def _codec(bundle: Bundle, model: str | None, embeddings: Path | None, out: Path) -> Codec | None:
    """Text encoder and VAE; None where the request needs neither."""
    from blockcache.runtime import ConfigError
    from blockcache.tools.sources.codecs import codec_for
    from blockcache.tools.sources.models import DEMO

    name = model or (DEMO if bundle.model.name == DEMO else None)
    if name is None and (embeddings is None or out.suffix == ".png"):
        raise ConfigError(
            "Expected --model FOLDER (for text encoder and VAE), or --embeddings FILE together "
            "with --out FILE.npy; got neither."
        )
    return None if name is None else codec_for(name)


def _conditions(
    codec: Codec | None,
    embeddings: Path | None,
    prompts: list[str] | None,
    size: tuple[int, int],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Positive and negative conditions by name."""
    from blockcache.runtime import ConfigError

    if embeddings is not None:
        from blockcache.export.measure.encoded_prompts import read_encoded_prompts

        return read_encoded_prompts(embeddings)
    if not prompts or codec is None:
        raise ConfigError("Expected at least one --prompt or --embeddings FILE, got none.")
    return codec.encode(prompts, size)


def _write(latents: np.ndarray, codec: Codec | None, out: Path) -> None:
    """Pictures or latents, by the suffix of ``out``."""
    if codec is not None and out.suffix == ".png":
        from blockcache.tools.report.pictures import save_pictures

        save_pictures(codec.decode(latents), out)
    else:
        import numpy as np

        from blockcache.runtime.files import replacing

        with replacing(out) as file:
            np.save(file, latents)
