"""``blockcache run``: prompts to pictures or latents with a bundle."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockcache.tools.commands.options import (
    AsJson,
    BackendName,
    BundleFolder,
    PresetName,
    Threads,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from blockcache.runtime import Backend, Bundle, Drawn


OUTPUTS = (".png", ".npy")
"""What ``--out`` may be: a picture, or latents."""


def run(
    bundle: BundleFolder,
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw; repeatable, one image each.")
    ] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What not to draw, of all images.")
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(help="Encoded prompts instead (safetensors, as for compile --calibration)."),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(help="A picture to start from: image to image.")
    ] = None,
    strength: Annotated[
        float, typer.Option(help="How much of --image is drawn anew, above 0 to 1.")
    ] = 0.8,
    preset: PresetName = None,
    seed: Annotated[int, typer.Option(help="Image i uses SEED + i.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Default: the preset's.")] = None,
    guidance_rescale: Annotated[
        float, typer.Option(help="0 (off) to 1: keep strong guidance from burning out colours.")
    ] = 0.0,
    height: Annotated[int | None, typer.Option(help="In pixels; default the model's.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels; default the model's.")] = None,
    tile: Annotated[
        int | None, typer.Option(help="Decode in tiles of so many pixels: less memory.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="FILE.png: pictures side by side; FILE.npy: latents [N, C, H, W].")
    ] = Path("out.png"),
    backend: BackendName = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Draw prompts by a bundle's preset and write pictures. Needs no torch.

    Example: blockcache run demo-out/bundle --prompt "twitter emoji, red apple" --out apple.png
    """
    from blockcache.runtime import Bundle, ConfigError, Pipeline
    from blockcache.runtime.engines.choice import make_backend
    from blockcache.tools.commands.names import preset_of
    from blockcache.tools.commands.outputs import check_file
    from blockcache.tools.report.progress import StageProgress

    check_file(out, OUTPUTS)
    if (embeddings is None) == (not prompt):
        raise ConfigError("Expected at least one --prompt, or --embeddings FILE; not both.")
    if embeddings is not None:
        given = {"negative-prompt": negative_prompt, "image": image, "tile": tile}
        _refuse_with_embeddings(given | {"height": height, "width": width})
    opened = Bundle.open(bundle)
    name = preset_of(opened, preset)
    start = None if image is None else _picture(image)
    engines = make_backend(backend, threads=threads, bundle=opened, verify=False)
    with StageProgress() as progress:
        shared: dict[str, Any] = {
            "guidance_scale": guidance,
            "guidance_rescale": guidance_rescale,
            "callback": lambda at: progress(f"denoise {name}", at.step + 1, at.steps),
        }
        if embeddings is not None:
            made = _from_embeddings(opened, name, engines, embeddings, seed, out, shared)
        else:
            texts = list(prompt or ())
            made = Pipeline.open(opened, preset=name, backend=engines)(
                texts,
                negative_prompt,
                seeds=range(seed, seed + len(texts)),
                height=height,
                width=width,
                image=start,
                strength=None if start is None else strength,
                tile=tile,
                **shared,
            )
    _write(made.images, made.latents, out)
    print(f"wrote {out}", file=sys.stderr)
    facts = {"preset": name, "images": len(made.latents), "out": str(out), **made.summary()}
    print(json.dumps(facts) if as_json else "  ".join(f"{k} {v}" for k, v in facts.items()))


def _refuse_with_embeddings(options: Mapping[str, object]) -> None:
    """Raise ConfigError for what only prompts can take."""
    from blockcache.runtime import ConfigError

    given = [f"--{name}" for name, value in options.items() if value is not None]
    if given:
        raise ConfigError(
            f"Expected no {' and no '.join(given)} beside --embeddings, which go to the U-Net as "
            f"they are. Give --prompt instead."
        )


def _picture(file: Path) -> np.ndarray:
    """A picture from a file: uint8 [1, H, W, 3]."""
    from blockcache.tools.report.pictures import read_picture

    return read_picture(file)[None]


def _from_embeddings(
    bundle: Bundle,
    preset: str,
    engines: Backend,
    file: Path,
    seed: int,
    out: Path,
    options: dict[str, Any],
) -> Drawn:
    """Denoise encoded prompts; decoded where pictures are asked for."""
    import numpy as np

    from blockcache.export.measure.encoded_prompts import read_encoded_prompts
    from blockcache.runtime import Drawn, Pipeline, Session

    positive, negative = read_encoded_prompts(file)
    images = max(len(values) for values in positive.values())
    if out.suffix == ".png":
        pipeline = Pipeline.open(bundle, preset=preset, backend=engines)
        session, decode = pipeline.session, pipeline.decode
    else:
        session = Session.open(bundle, preset=preset, backend=engines)
        decode = None
    seeds = tuple(range(seed, seed + images))
    result = session.denoise(
        session.noise(seeds),
        positive.pop("encoder_hidden_states"),
        negative.pop("encoder_hidden_states", None),
        conditions=positive,
        negative_conditions=negative,
        seeds=seeds,
        **options,
    )
    begin = time.perf_counter()
    pictures = np.zeros((0, 0, 0, 3), np.uint8) if decode is None else decode(result.latents)
    taken = (time.perf_counter() - begin) * 1e3
    return Drawn(pictures, seeds, result.latents, result.record, 0.0, taken, ("",) * images)


def _write(images: np.ndarray, latents: np.ndarray, out: Path) -> None:
    """Pictures or latents, by the suffix of ``out``."""
    if out.suffix == ".png":
        from blockcache.tools.report.pictures import save_pictures

        save_pictures(images, out)
    else:
        import numpy as np

        from blockcache.runtime.files import replacing

        with replacing(out) as file:
            np.save(file, latents)
