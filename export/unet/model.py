"""The source model: a U-Net, its blocks and its inputs, and what is refused by name.

Everything the exporter needs to know is read from the config; no shape is typed by hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from blockcache.export.unet.control import check_controlnet, control_factor, picture_factor
from blockcache.export.unet.extra_inputs import ExtraInput, find_extra_inputs
from blockcache.export.unet.lora import Lora
from blockcache.runtime.errors import ConfigError, UnsupportedModelError
from blockcache.runtime.plan import WHOLE, Dim, LoraFacts, Sizes, control_names

if TYPE_CHECKING:
    from diffusers import ControlNetModel, UNet2DConditionModel

TORCH_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
DEFAULT_TOKENS = 77
"""Prompt length where the folder names no tokenizer: that of CLIP."""

SUPPORTED_CLASS = "UNet2DConditionModel"
"""diffusers' class. One derived from it may compute something else, so it is refused too."""

_STAGE_ORDER = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
BLOCK_CLASSES = {"transformers": "Transformer2DModel", "resnets": "ResnetBlock2D"}
"""What may be cached, by name: the module class whose residual branch is a block. The paper caches
spatial transformers (section 3.3) and shows why ResBlocks are a bad choice (Fig. 8)."""


BRANCH = "branch"


@dataclass(frozen=True)
class Block:
    """A cacheable unit: the residual branch C_i of one spatial transformer (eq. 4, 5).

    Or a whole branch of the U-Net: everything below a cut of the up path. Its output is what the
    ResBlock at ``path`` concatenates to a skip. At the cut ``WHOLE`` it is the U-Net itself, whose
    output is that of the convolution at ``path``.
    """

    path: str  # of the module: "mid_block.attentions.0", "controlnet.0.mid_block.attentions.0"
    channels: int  # C_k, of its output
    kind: str = "transformers"  # a key of ``BLOCK_CLASSES``, or ``BRANCH``
    depth: int = 0  # skips above it: a branch of depth d holds all that is deeper than d


@dataclass(frozen=True)
class Condition:
    """An input of the U-Net besides sample and timestep."""

    name: str
    shape: tuple[int | str, ...]  # ints, or sizes as ``Dim`` writes them: "batch", "8*height"
    dtype: str  # "model": the model's own floating dtype; else "float32" or "int64"
    beside_sample: bool = False  # a picture whose channels are laid behind the sample's

    @property
    def dims(self) -> tuple[Dim, ...]:
        """The shape as the runtime has it."""
        return tuple(Dim.parse(size) for size in self.shape)

    def sized(self, sizes: Sizes) -> tuple[int, ...]:
        """The concrete shape at ``sizes``."""
        return tuple(dim.value(sizes) for dim in self.dims)


@dataclass(frozen=True)
class SourceModel:
    """A loaded U-Net with everything the stages ask about it."""

    name: str
    unet: UNet2DConditionModel
    scheduler: Mapping[str, Any]  # scheduler_config.json, {} where the folder has none
    blocks: tuple[Block, ...]  # in execution order
    conditions: tuple[Condition, ...]
    tokens: int
    sha256: str  # of the config and the weights: the key of every later stage
    loras: tuple[LoraFacts, ...] = ()  # merged into the weights
    controlnets: tuple[ControlNetModel, ...] = ()  # they run with the U-Net, and add up

    def call(self) -> UNetCall:
        """U-Net and ControlNets as one module, which shares theirs."""
        return UNetCall(self.unet, self.conditions, self.controlnets)

    def cut_at(self, depths: Sequence[int]) -> SourceModel:
        """The same model with branches behind its blocks, the shallowest first.

        Args:
            depths: of the cuts: 0 lies before the last concatenation of the up path, ``WHOLE``
                behind the last convolution.

        Raises:
            ConfigError: a depth that the U-Net does not have.
        """
        known = {branch.depth: branch for branch in find_branches(self.unet)}
        wrong = [depth for depth in depths if depth not in known]
        if wrong:
            raise ConfigError(
                f"Expected cuts of {WHOLE} to {max(known)} in {self.name!r}, which has "
                f"{max(known) + 1} skips; got {wrong[0]}."
            )
        branches = tuple(known[depth] for depth in sorted(set(depths)))
        blocks = tuple(block for block in self.blocks if block.kind != BRANCH)
        return replace(self, blocks=(*blocks, *branches))

    def part(self, cuts: Sequence[int]) -> SourceModel:
        """The same model with those branches alone, or with its blocks alone where none is named.

        What reuses the one need not measure the other.
        """
        if not cuts:
            return self.cut_at(())
        cut = self.cut_at(cuts)
        return replace(cut, blocks=tuple(block for block in cut.blocks if block.kind == BRANCH))

    @property
    def depths(self) -> tuple[int, ...]:
        """Of the cuts that the U-Net has."""
        return tuple(branch.depth for branch in find_branches(self.unet))

    @property
    def cuts(self) -> tuple[int, ...]:
        """Depths of the branches."""
        return tuple(block.depth for block in self.blocks if block.kind == BRANCH)

    @property
    def config(self) -> dict[str, Any]:
        """The U-Net's config as JSON has it, without what diffusers keeps there for itself."""
        public = {k: v for k, v in dict(self.unet.config).items() if not k.startswith("_")}
        found: dict[str, Any] = json.loads(json.dumps(public))
        return found

    @property
    def channels(self) -> int:
        """C of the sample and of the model output; the U-Net may read more, see ``Condition``."""
        return int(self.unet.config.out_channels)

    @property
    def downsampling(self) -> int:
        """Height and width of the latents are multiples of this."""
        return int(2 ** (len(self.unet.config.block_out_channels) - 1))

    @property
    def sample_size(self) -> tuple[int, int]:
        """Default latent (height, width)."""
        size = self.unet.config.sample_size or 64
        return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))

    def sizes(self, batch: int = 2) -> Sizes:
        """The default ones; batch 2 is one image with guidance."""
        height, width = self.sample_size
        return Sizes(batch=batch, height=height, width=width, tokens=self.tokens)


class UNetCall(torch.nn.Module):
    """The U-Net as a function of positional tensors, the same for export and reference.

    ``forward(sample [N,C,H,W], timestep [N], *conditions)`` gives the model output [N,C,H,W].
    Pictures that the U-Net reads beside the sample are conditions like others. With ControlNets
    each of them sees the sample and a picture of its own; what they make of them adds up.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        conditions: Sequence[Condition],
        controlnets: Sequence[ControlNetModel] = (),
    ) -> None:
        super().__init__()
        self.unet = unet
        self.controlnet = torch.nn.ModuleList(controlnets)
        self.names = tuple(condition.name for condition in conditions)
        self.beside = tuple(c.name for c in conditions if c.beside_sample)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, *conditions: torch.Tensor
    ) -> torch.Tensor:
        """One evaluation of the U-Net."""
        named = dict(zip(self.names, conditions, strict=True))
        beside = [named.pop(name) for name in self.beside]
        controls = [
            [named.pop(name) for name in control_names(index)]
            for index in range(len(self.controlnet))
        ]
        arguments: dict[str, Any] = {
            key: named.pop(key) for key in ("encoder_hidden_states", "class_labels") if key in named
        }
        if named:
            arguments["added_cond_kwargs"] = named
        residuals = [
            net(
                sample,
                timestep,
                controlnet_cond=picture,
                conditioning_scale=control_factor(scale, timestep),
                return_dict=False,
                **arguments,
            )
            for net, (picture, scale) in zip(self.controlnet, controls, strict=True)
        ]
        if residuals:
            down = zip(*(skips for skips, _ in residuals), strict=True)
            arguments["down_block_additional_residuals"] = [_sum(each, sample) for each in down]
            middle = [middle for _, middle in residuals]
            arguments["mid_block_additional_residual"] = _sum(middle, sample)
        if beside:
            sample = torch.cat([sample, *beside], dim=1)
        output: torch.Tensor = self.unet(sample, timestep, return_dict=False, **arguments)[0]
        return output


def module_path(path: str) -> str:
    """Where the module of a block stands in a ``UNetCall``."""
    return path if path.startswith("controlnet.") else f"unet.{path}"


def _sum(residuals: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    """What ControlNets add to one skip; each is scaled in float32 and rounded once."""
    first, *others = (residual.to(like.dtype) for residual in residuals)
    return sum(others, start=first)


def describe(
    unet: UNet2DConditionModel,
    *,
    name: str,
    scheduler: Mapping[str, Any] | None = None,
    tokens: int = DEFAULT_TOKENS,
    sha256: str | None = None,
    cached: str = "transformers",
    pooled: int | None = None,
    loras: Sequence[Lora] = (),
    extra_inputs: Sequence[ExtraInput] | None = None,
    controlnets: Sequence[ControlNetModel] = (),
) -> SourceModel:
    """Wrap a U-Net that is in memory already; refuses unsupported features by name.

    ``pooled`` is the width of ``text_embeds`` where the model takes them and it is known; ``loras``
    have been merged into the weights; ``extra_inputs`` is what it reads beside the sample, by
    default what its number of channels says. ``controlnets`` run with the U-Net; a ``sha256`` that
    is given is of all of them.
    """
    if cached not in BLOCK_CLASSES:
        raise ConfigError(f"Expected blocks of {tuple(BLOCK_CLASSES)}, got {cached!r}.")
    config = dict(unet.config)
    check_supported({**config, "_class_name": type(unet).__name__})
    extra = find_extra_inputs(config) if extra_inputs is None else tuple(extra_inputs)
    for net in controlnets:
        check_controlnet({**net.config, "_class_name": type(net).__name__}, config)
    for network in (unet, *controlnets):
        network.eval().requires_grad_(False)
    blocks = find_blocks(unet, BLOCK_CLASSES[cached])
    if not blocks:
        raise UnsupportedModelError(
            f"Expected a U-Net with {cached} ({BLOCK_CLASSES[cached]}); {name} has none, so there "
            f"is nothing to cache."
        )
    for index, net in reversed([*enumerate(controlnets)]):  # they run before the U-Net
        theirs = find_blocks(net, BLOCK_CLASSES[cached])
        named = [replace(block, path=f"controlnet.{index}.{block.path}") for block in theirs]
        blocks = (*named, *blocks)
    digest = sha256 or hash_models([_hash_module(network) for network in (unet, *controlnets)])
    if cached != "transformers":  # the same weights cut elsewhere are another model to all stages
        digest = hashlib.sha256(f"{digest} {cached}".encode()).hexdigest()
    if extra:  # and so are the same weights with inputs of other names
        digest = hashlib.sha256(f"{digest} {', '.join(map(str, extra))}".encode()).hexdigest()
    return SourceModel(
        name=name,
        unet=unet,
        scheduler=dict(scheduler or {}),
        blocks=blocks,
        conditions=(
            *_conditions(config, pooled),
            *map(_beside_sample, extra),
            *_control_conditions(controlnets),
        ),
        tokens=tokens,
        sha256=digest,
        loras=tuple(LoraFacts(lora.path.name, lora.sha256, lora.scale) for lora in loras),
        controlnets=tuple(controlnets),
    )


def find_blocks(
    unet: UNet2DConditionModel | ControlNetModel, class_name: str = BLOCK_CLASSES["transformers"]
) -> tuple[Block, ...]:
    """The cacheable blocks in execution order: down, middle, up; a ControlNet has no up path."""
    kind = next(kind for kind, name in BLOCK_CLASSES.items() if name == class_name)
    depths = _depths(unet)
    found = []
    for path, module in unet.named_modules():
        if type(module).__name__ == class_name:
            channels = getattr(module, "out_channels", None) or module.in_channels
            found.append(Block(path, int(channels), kind, depths.get(path, 0)))
    # diffusers registers up_blocks before mid_block; the sort is stable within a stage.
    return tuple(sorted(found, key=lambda block: _STAGE_ORDER[block.path.split(".")[0]]))


def find_branches(unet: UNet2DConditionModel) -> tuple[Block, ...]:
    """The whole U-Net, and what lies below each cut of the up path, the shallowest first.

    The U-Net alone where skips and cuts do not pair.
    """
    whole = Block("conv_out", int(unet.conv_out.out_channels), BRANCH, WHOLE)
    widths = [unet.conv_in.out_channels]  # of the skips, in the order in which they are made
    for down in unet.down_blocks:
        widths += [resnet.out_channels for resnet in down.resnets]
        widths += [down.resnets[-1].out_channels] * bool(down.downsamplers)
    joins = [
        (f"up_blocks.{i}.resnets.{j}", resnet)
        for i, up in enumerate(unet.up_blocks)
        for j, resnet in enumerate(up.resnets)
    ]
    if len(joins) != len(widths):
        return (whole,)
    return whole, *(
        Block(path, int(resnet.in_channels - width), BRANCH, depth)
        for depth, (width, (path, resnet)) in enumerate(zip(widths, reversed(joins), strict=True))
    )


def _depths(unet: UNet2DConditionModel | ControlNetModel) -> dict[str, int]:
    """How many skips lie above each layer, by module path.

    A layer of a ControlNet feeds the skips that the same layer of the U-Net does.
    """
    depths: dict[str, int] = {}
    skips = 1  # the first is conv_in's
    for i, down in enumerate(unet.down_blocks):
        for j in range(len(down.resnets)):
            layer = {f"down_blocks.{i}.{kind}.{j}": skips for kind in ("resnets", "attentions")}
            depths.update(layer)
            skips += 1
        skips += bool(down.downsamplers)
    middle = [f"mid_block.{kind}.{j}" for kind in ("resnets", "attentions") for j in range(9)]
    depths.update(dict.fromkeys(middle, skips))
    for i, up in enumerate(unet.up_blocks if hasattr(unet, "up_blocks") else ()):
        for j in range(len(up.resnets)):
            skips -= 1
            layer = {f"up_blocks.{i}.{kind}.{j}": skips for kind in ("resnets", "attentions")}
            depths.update(layer)
    return depths


def check_supported(config: Mapping[str, Any]) -> None:
    """Raise UnsupportedModelError for models and features that are not exported exactly."""
    kind = config.get("_class_name", SUPPORTED_CLASS)
    if kind != SUPPORTED_CLASS:
        raise UnsupportedModelError(
            f"Expected a {SUPPORTED_CLASS}, got {kind}, which blockcache does not support: its "
            f"forward differs. Supported are the text-conditioned U-Nets of Stable Diffusion 1.x, "
            f"2.x and XL."
        )
    refusals = {
        "IP-adapter or image projection (encoder_hid_dim_type)": config.get("encoder_hid_dim_type")
        not in (None, "text_proj"),
        f"added conditions of type {config.get('addition_embed_type')!r}": config.get(
            "addition_embed_type"
        )
        not in (None, "text", "text_time"),
        "GLIGEN gated attention (attention_type)": config.get("attention_type", "default")
        != "default",
        "guidance embedding (time_cond_proj_dim)": config.get("time_cond_proj_dim") is not None,
        "dual cross attention": bool(config.get("dual_cross_attention")),
        "class embedding concatenated to the time embedding": bool(
            config.get("class_embeddings_concat")
        ),
    }
    for feature, present in refusals.items():
        if present:
            raise UnsupportedModelError(
                f"This U-Net uses {feature}, which blockcache does not support. Supported are "
                f"text-conditioned U-Nets such as Stable Diffusion 1.x, 2.x and XL; ControlNet "
                f"residuals and adapters cannot be exported either."
            )


def _beside_sample(extra: ExtraInput) -> Condition:
    """A picture that the U-Net reads beside the sample."""
    shape = ("batch", extra.channels, "height", "width")
    return Condition(extra.name, shape, "model", beside_sample=True)


def _conditions(config: Mapping[str, Any], pooled: int | None) -> tuple[Condition, ...]:
    """The inputs besides sample and timestep."""
    width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    if not isinstance(width, int):
        width = width[0]
    found = [Condition("encoder_hidden_states", ("batch", "tokens", width), "model")]
    if config.get("addition_embed_type") == "text_time":
        ids, pooled = _added_widths(config, width, pooled)
        found.append(Condition("text_embeds", ("batch", pooled), "model"))
        found.append(Condition("time_ids", ("batch", ids), "model"))
    kind = config.get("class_embed_type")
    if kind in ("projection", "simple_projection"):
        size = config["projection_class_embeddings_input_dim"]
        found.append(Condition("class_labels", ("batch", size), "model"))
    elif kind == "timestep":
        found.append(Condition("class_labels", ("batch",), "model"))
    elif kind == "identity":
        size = config.get("time_embedding_dim") or config["block_out_channels"][0] * 4
        found.append(Condition("class_labels", ("batch", size), "model"))
    elif config.get("num_class_embeds") is not None:
        found.append(Condition("class_labels", ("batch",), "int64"))
    return tuple(found)


def _control_conditions(controlnets: Sequence[ControlNetModel]) -> list[Condition]:
    """A picture and a scale for each, see ``control_factor``."""
    found = []
    for index, net in enumerate(controlnets):
        picture, scale = control_names(index)
        factor, channels = picture_factor(net.config), net.config.conditioning_channels
        shape = ("batch", int(channels), f"{factor}*height", f"{factor}*width")
        found += [Condition(picture, shape, "model"), Condition(scale, ("batch", 3), "float32")]
    return found


def _added_widths(config: Mapping[str, Any], width: int, pooled: int | None) -> tuple[int, int]:
    """Widths of ``time_ids`` and ``text_embeds``; the config tells only that of both together.

    There are six ids, or the five of SDXL's refiner. Where ``pooled`` is not known, the refiner is
    told by its text encoder: the only one, so that states and pooled state are of one ``width``.
    """
    both, each = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
    rest = {ids: both - ids * each for ids in (6, 5)}
    if pooled is None:
        pooled = rest[5] if rest[5] == width else rest[6]
    for ids, left in rest.items():
        if left == pooled > 0:
            return ids, left
    raise UnsupportedModelError(
        f"Expected added conditions of 5 or 6 time_ids, {each} numbers each, and text_embeds of "
        f"{pooled}; got {both} numbers in all (projection_class_embeddings_input_dim). Check the "
        f"configs of U-Net and text encoder."
    )


def hash_models(digests: Sequence[str]) -> str:
    """One digest of those of a U-Net and its ControlNets; the U-Net's own where it stands alone."""
    own, *others = digests
    return hashlib.sha256(" ".join(digests).encode()).hexdigest() if others else own


def _hash_module(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
