"""``blockcache run``: prompts to pictures or latents with a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import numpy as np


def run(
    bundle: Annotated[Path, typer.Argument(help="A folder that 'blockcache compile' wrote.")],
    prompt: Annotated[
        list[str] | None, typer.Option(help="What to draw; repeatable, one image each.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Where text encoder and VAE come from: 'demo' or a diffusers folder. Default "
            "'demo' for a bundle of the demo model."
        ),
    ] = None,
    embeddings: Annotated[
        Path | None,
        typer.Option(help="Encoded prompts instead (safetensors, as for compile --calibration)."),
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Default: the first cached one.")] = None,
    seed: Annotated[int, typer.Option(help="Image i uses SEED + i.")] = 0,
    guidance: Annotated[float | None, typer.Option(help="Default: the preset's.")] = None,
    height: Annotated[int | None, typer.Option(help="Latent height; default the model's.")] = None,
    width: Annotated[int | None, typer.Option(help="Latent width; default the model's.")] = None,
    out: Annotated[
        Path, typer.Option(help="FILE.png: a grid of pictures; FILE.npy: latents [N, C, H, W].")
    ] = Path("out.png"),
    backend: Annotated[str, typer.Option(help="auto, ort or empty.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine library.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Denoise prompts by a bundle's preset and write pictures.

    Example: blockcache run demo-bundle --prompt "twitter emoji, red apple" --out apple.png
    """
    from blockcache.runtime import Bundle, ConfigError, Session
    from blockcache.tools.commands.show import default_preset
    from blockcache.tools.progress import StageProgress
    from blockcache.tools.sources import DEMO, codec_for

    opened = Bundle.open(bundle)
    name = preset or default_preset(opened)
    codec_name = model or (DEMO if opened.model.name == DEMO else None)
    if out.suffix not in (".png", ".npy"):
        raise ConfigError(f"Expected --out FILE.png or FILE.npy, got {out}.")
    if codec_name is None and (embeddings is None or out.suffix == ".png"):
        raise ConfigError(
            "Expected --model FOLDER (for text encoder and VAE), or --embeddings FILE together "
            "with --out FILE.npy; got neither."
        )
    positive, negative = _conditions(codec_name, embeddings, prompt)
    images = max(len(values) for values in positive.values())
    session = Session.open(opened, preset=name, backend=backend, threads=threads)
    noise = session.noise(range(seed, seed + images), height, width)
    with StageProgress(quiet=as_json) as progress:
        result = session.denoise(
            noise,
            positive.pop("encoder_hidden_states"),
            negative.pop("encoder_hidden_states", None),
            conditions=positive,
            negative_conditions=negative,
            guidance_scale=guidance,
            callback=lambda at: progress(f"denoise {name}", at.step + 1, at.steps),
        )
    if out.suffix == ".npy":
        import numpy as np

        np.save(out, result.latents)
    else:
        from blockcache.tools.plots import save_pictures

        assert codec_name is not None
        save_pictures(codec_for(codec_name).decode(result.latents), out)
    facts = {"preset": name, "images": images, "out": str(out), **result.record.summary()}
    print(json.dumps(facts) if as_json else "  ".join(f"{k} {v}" for k, v in facts.items()))


def _conditions(
    codec_name: str | None, embeddings: Path | None, prompts: list[str] | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Positive and negative conditions by name."""
    from blockcache.runtime import ConfigError
    from blockcache.tools.sources import codec_for

    if embeddings is not None:
        from blockcache.export.calibration import read_calibration

        read = read_calibration(embeddings)
        return dict(read.positive), dict(read.negative)
    if not prompts:
        raise ConfigError("Expected at least one --prompt or --embeddings FILE, got none.")
    assert codec_name is not None
    codec = codec_for(codec_name)
    return codec.encode(prompts), codec.encode([""])
