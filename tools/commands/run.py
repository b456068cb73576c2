"""``blockcache run``: prompts to pictures or latents with a bundle."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from blockcache.tools.commands.options import (
    AsJson,
    BackendName,
    BundleFolder,
    PresetName,
    Threads,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from blockcache.runtime import Backend, Bundle, Drawn, Pipeline

T = TypeVar("T")

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
        Path | None,
        typer.Option(
            help="A picture to start from; or to inpaint, edit or enlarge, as the model does."
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="How much of --image is drawn anew, above 0 to 1. Default 0.8; inpainting: 1."
        ),
    ] = None,
    mask_image: Annotated[
        Path | None, typer.Option(help="Inpainting: what is white is drawn anew.")
    ] = None,
    depth_map: Annotated[
        Path | None,
        typer.Option(help="depth2img: a grey picture or FILE.npy [h, w]; near is large."),
    ] = None,
    image_guidance: Annotated[
        float | None,
        typer.Option(help="InstructPix2Pix: how far to follow --image. Default 1.5."),
    ] = None,
    noise_level: Annotated[
        int | None,
        typer.Option(help="Upscalers: how much --image is noised first. Default 20."),
    ] = None,
    control_image: Annotated[
        list[Path] | None,
        typer.Option(help="What a ControlNet follows; once for each, in the order of compile."),
    ] = None,
    control_scale: Annotated[
        list[float] | None,
        typer.Option(help="controlnet_conditioning_scale: one, or one each. Default 1."),
    ] = None,
    control_start: Annotated[
        list[float] | None,
        typer.Option(help="control_guidance_start: one, or one each. Default 0."),
    ] = None,
    control_end: Annotated[
        list[float] | None,
        typer.Option(help="control_guidance_end: one, or one each. Default 1."),
    ] = None,
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
    from blockcache.tools.commands.names import preset_of, warn_of_guidance
    from blockcache.tools.commands.outputs import check_file
    from blockcache.tools.report.progress import StageProgress
    from blockcache.tools.sources.pictures import read_mask, read_picture

    check_file(out, OUTPUTS)
    if (embeddings is None) == (not prompt):
        raise ConfigError("Expected at least one --prompt, or --embeddings FILE; not both.")
    if embeddings is not None:
        _refuse_with_embeddings(
            {
                "negative-prompt": negative_prompt,
                "image": image,
                "strength": strength,
                "mask-image": mask_image,
                "depth-map": depth_map,
                "noise-level": noise_level,
                "control-image": control_image,
                "tile": tile,
                "height": height,
                "width": width,
            }
        )
    _refuse_without_picture(control_image, control_scale, control_start, control_end)
    opened = Bundle.open(bundle)
    name = preset_of(opened, preset)
    warn_of_guidance(opened.preset(name), guidance)
    start = None if image is None else read_picture(image)[None]
    mask = None if mask_image is None else read_mask(mask_image)
    followed = [read_picture(file) for file in control_image or ()]
    engines = make_backend(backend, threads=threads, bundle=opened, verify=False)
    with StageProgress() as progress:
        shared: dict[str, Any] = {
            "guidance_scale": guidance,
            "guidance_rescale": guidance_rescale,
            "callback": lambda at: progress(f"denoise {name}", at.step + 1, at.steps),
        }
        if image_guidance is not None:
            shared["image_guidance_scale"] = image_guidance
        if embeddings is not None:
            made = _from_embeddings(opened, name, engines, embeddings, seed, out, shared)
        else:
            texts = list(prompt or ())
            pipeline = Pipeline.open(opened, preset=name, backend=engines)
            made = pipeline(
                texts,
                negative_prompt,
                seeds=range(seed, seed + len(texts)),
                height=height,
                width=width,
                image=start,
                strength=strength,
                mask_image=mask,
                noise_level=noise_level,
                depth_map=_depths(pipeline, depth_map, start, height, width),
                control_image=_one_or_all(followed, None),
                controlnet_conditioning_scale=_one_or_all(control_scale, 1.0),
                control_guidance_start=_one_or_all(control_start, 0.0),
                control_guidance_end=_one_or_all(control_end, 1.0),
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


def _refuse_without_picture(
    pictures: Sequence[Path] | None, *numbers: Sequence[float] | None
) -> None:
    """Raise ConfigError where it is said how a ControlNet acts and not what it follows."""
    from blockcache.runtime import ConfigError

    if not pictures and any(numbers):
        raise ConfigError(
            "Expected --control-image FILE beside --control-scale, --control-start and "
            "--control-end, which say how strongly and when a ControlNet follows it; got none."
        )


def _one_or_all(given: Sequence[T] | None, default: T) -> T | Sequence[T]:
    """What is given once serves all ControlNets; the default where nothing is."""
    if not given:
        return default
    return given[0] if len(given) == 1 else list(given)


def _depths(
    pipeline: Pipeline,
    file: Path | None,
    image: np.ndarray | None,
    height: int | None,
    width: int | None,
) -> np.ndarray | None:
    """The depths of a file, float32 of the size of the latents to draw."""
    from blockcache.runtime.pipeline.picture_arguments import latent_size
    from blockcache.tools.sources.pictures import read_depths

    if file is None:
        return None
    model, factor = pipeline.session.bundle.model, pipeline.factor
    given = None if image is None else (image.shape[1], image.shape[2])
    return read_depths(file, latent_size(model, factor, given, height, width))


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
