"""What is trained and how: frozen options, with one preset for a CPU and one for a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

TOKENS = 20  # caption tokens the U-Net attends to
TEXT_CHANNELS = 384  # width of the MiniLM token states
LATENT_CHANNELS = 4
TIMESTEPS = 1000  # training timesteps of the noise schedule


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """One npm package of colour emoji and what its licence asks us to say."""

    package: str  # name under the npm scope @iconify-json
    word: str  # how captions name the style
    title: str
    author: str
    licence: str  # SPDX
    url: str


NOTO = ImageSet(
    package="noto",
    word="noto",
    title="Noto Emoji",
    author="Google Inc",
    licence="Apache-2.0",
    url="https://github.com/googlefonts/noto-emoji",
)
NOTO_V1 = replace(NOTO, package="noto-v1", word="old noto", title="Noto Emoji (v1)")
TWEMOJI = ImageSet(
    package="twemoji",
    word="twitter",
    title="Twitter Emoji",
    author="Twitter",
    licence="CC-BY-4.0",
    url="https://github.com/twitter/twemoji",
)
FLUENT = ImageSet(
    package="fluent-emoji",
    word="glossy",
    title="Fluent Emoji",
    author="Microsoft Corporation",
    licence="MIT",
    url="https://github.com/microsoft/fluentui-emoji",
)
FLUENT_FLAT = replace(FLUENT, package="fluent-emoji-flat", word="flat", title="Fluent Emoji Flat")
EMOJIONE = ImageSet(
    package="emojione",
    word="emojione",
    title="Emoji One (Colored)",
    author="Emoji One",
    licence="CC-BY-4.0",
    url="https://github.com/EmojiTwo/emojitwo",
)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures the model sees."""

    sets: tuple[ImageSet, ...] = (NOTO, TWEMOJI, FLUENT_FLAT)
    pixels: int = 64  # height and width of a picture
    small_world: bool = True  # only the everyday and the simple concepts
    held_out_percent: int = 5  # of the (style, concept) pairs; everyday ones are never held out
    flag_weight: float = 0.3  # sampling weight of a country flag, others 1
    everyday_weight: float = 1.5  # sampling weight of the everyday concepts

    def __post_init__(self) -> None:
        if self.pixels % 4:
            raise ValueError(f"pixels must be a multiple of 4, got {self.pixels}: use 64 or 128")
        if not self.sets:
            raise ValueError("sets must name at least one image set, got none")


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """Shape and training of the autoencoder (f = 4)."""

    wide: int = 96  # channels at a quarter of the resolution
    narrow: int = 48  # channels at half of the resolution
    batch: int = 16
    learning_rate: float = 2e-3
    latent_noise: float = 0.1  # standard deviation added to latents in training
    minutes: float = 8.0  # wall-clock budget


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Shape of the U-Net; its spatial transformers are the cacheable blocks."""

    channels: tuple[int, ...] = (64, 128, 160)
    transformer_layers: tuple[int, ...] = (2, 2, 1)
    layers_per_block: int = 1
    head_channels: int = 32
    norm_groups: int = 16


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Training of the U-Net."""

    batch: int = 32
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    caption_dropout: float = 0.1
    snr_cap: float = 5.0  # where nearly clean samples begin to be drawn less often
    ema_decay: float = 0.998
    minutes: float = 67.0  # of training, pauses not counted; the learning rate ends with it
    checkpoint_minutes: float = 4.0
    workers: int = 2  # single-threaded processes that share the weights (CPU); 1 on a GPU
    piece: int = 16  # pictures a worker takes at a time; 0: the whole batch


@dataclass(frozen=True, kw_only=True)
class Preset:
    """All options of one way to make the demo model."""

    name: str
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    @property
    def latent_size(self) -> int:
        """Height and width of the latents."""
        return self.data.pixels // 4


CPU = Preset(name="cpu")
GPU = Preset(
    name="gpu",
    data=DataConfig(
        sets=(NOTO, NOTO_V1, TWEMOJI, FLUENT, FLUENT_FLAT, EMOJIONE),
        pixels=128,
        small_world=False,
        everyday_weight=6.0,
    ),
    autoencoder=AutoencoderConfig(wide=192, narrow=96, batch=64, learning_rate=1e-3, minutes=5.0),
    unet=UNetConfig(channels=(96, 192, 256)),
    train=TrainConfig(
        batch=256,
        learning_rate=6e-4,
        warmup_steps=500,
        ema_decay=0.9995,
        minutes=18.0,
        workers=1,
        piece=0,
    ),
)
PRESETS = {preset.name: preset for preset in (CPU, GPU)}
