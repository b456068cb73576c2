"""Make the demo model: `python -m blockcache.tools.demo COMMAND`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from blockcache.tools.demo.config import PRESETS, Preset
from blockcache.tools.demo.model import MODEL_DIR
from blockcache.tools.report.errors import one_line_errors

app = typer.Typer(
    help="Train and export the demo model: a small text-to-image latent diffusion model of colour "
    "emoji. Run `all` for everything; every stage can be run again.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Work = Annotated[Path, typer.Option(help="Where data and checkpoints go (needs about 1 GB).")]
PresetName = Annotated[
    str,
    typer.Option("--preset", help="cpu: 239 concepts at 64 px; gpu: all of them at 128 px."),
]
Minutes = Annotated[
    float, typer.Option(help="Budget of the training, pauses not counted; 0: the preset's own.")
]
Device = Annotated[str, typer.Option(help="Torch device: cpu or cuda.")]
Target = Annotated[Path, typer.Option(help="The model folder in diffusers format.")]

DEFAULT_WORK = Path("~/.cache/blockcache/demo")


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise typer.BadParameter(f"expected one of {', '.join(PRESETS)}, got {name}")
    return PRESETS[name]


def _folder(work: Path, preset: Preset) -> Path:
    return work.expanduser() / preset.name


@app.command()
def data(work: Work = DEFAULT_WORK, preset: PresetName = "cpu") -> None:
    """Fetch the npm packages, render the pictures, encode the captions."""
    from blockcache.tools.demo import contexts
    from blockcache.tools.demo import data as pictures

    chosen = _preset(preset)
    folder = _folder(work, chosen)
    dataset = pictures.build(chosen.data, folder)
    contexts.build(dataset, folder)
    held_out = sum(p.held_out for p in dataset.pictures)
    typer.echo(f"{len(dataset.pictures)} pictures, {held_out} of them held out, in {folder}")


@app.command()
def autoencoder(
    work: Work = DEFAULT_WORK,
    preset: PresetName = "cpu",
    minutes: Minutes = 0.0,
    device: Device = "cpu",
    reuse: Annotated[
        Path | None,
        typer.Option(
            help="Take the autoencoder of this model folder; with --minutes, train its decoder on."
        ),
    ] = None,
) -> None:
    """Train the autoencoder, or take a trained one, and encode all pictures."""
    from blockcache.tools.demo import data as pictures
    from blockcache.tools.demo import fit_autoencoder
    from blockcache.tools.demo.model import load_autoencoder

    chosen = _preset(preset)
    folder = _folder(work, chosen)
    config = chosen.autoencoder
    config = replace(config, minutes=minutes or config.minutes)
    dataset = pictures.load(folder)
    if reuse is None:
        fit_autoencoder.fit(dataset, config, folder, device)
    elif minutes:
        fit_autoencoder.refine(load_autoencoder(reuse), dataset, config, folder, device)
    else:
        fit_autoencoder.adopt(load_autoencoder(reuse), dataset, folder)
    typer.echo((folder / "autoencoder.txt").read_text().strip())


@app.command()
def unet(
    work: Work = DEFAULT_WORK,
    preset: PresetName = "cpu",
    minutes: Minutes = 0.0,
    device: Device = "cpu",
    start: Annotated[
        Path | None, typer.Option(help="Begin with the U-Net of this model folder.")
    ] = None,
    learning_rate: Annotated[
        float, typer.Option(help="At its peak; 0: the preset's own. Lower it with --start.")
    ] = 0.0,
) -> None:
    """Train the U-Net, or go on where a checkpoint stands."""
    from blockcache.tools.demo import checkpoint, train
    from blockcache.tools.demo.model import load_unet

    chosen = _preset(preset)
    config = replace(
        chosen.train,
        minutes=minutes or chosen.train.minutes,
        learning_rate=learning_rate or chosen.train.learning_rate,
    )
    chosen = replace(chosen, train=config)
    folder = _folder(work, chosen)
    weights = None if start is None else load_unet(start)
    if start is not None and (folder / train.FOLDER / checkpoint.NAME).exists():
        raise typer.BadParameter(
            f"a checkpoint is in {folder / train.FOLDER}: leave out --start to go on with it, or "
            f"delete it to begin anew"
        )
    trainer = train.Trainer(chosen, folder / train.FOLDER, device, weights)
    train.run(trainer, train.load_source(folder, chosen.train))
    typer.echo(f"{trainer.step} steps in {trainer.budget.spent_s / 60:.1f} minutes")


@app.command()
def export(work: Work = DEFAULT_WORK, preset: PresetName = "cpu", out: Target = MODEL_DIR) -> None:
    """Write the averaged weights as a diffusers-format folder in 16 bits."""
    from blockcache.tools.demo import export as writer

    chosen = _preset(preset)
    writer.export(chosen, _folder(work, chosen), out)
    typer.echo(f"model in {out}")


@app.command("all")
def everything(
    work: Work = DEFAULT_WORK, preset: PresetName = "cpu", device: Device = "cpu"
) -> None:
    """Data, autoencoder, U-Net and export, in this order."""
    data(work, preset)
    autoencoder(work, preset, 0.0, device)
    unet(work, preset, 0.0, device)
    export(work, preset, MODEL_DIR)


if __name__ == "__main__":
    with one_line_errors():
        app()
