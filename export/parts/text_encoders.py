"""Text encoders as graphs: token numbers to the states that a U-Net attends to."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ClipStates(nn.Module):
    """CLIP as Stable Diffusion calls it: states of the last layer, normalised, or of an earlier.

    Args:
        model: a CLIPTextModel, or a CLIPTextModelWithProjection.
        skip: None: the last layer's states behind the final norm; k >= 0: those of the layer k + 1
            before the last, as they are (SDXL: 0 is its penultimate layer).
        pooled: whether the projected state of the prompt's end is an output, too.
        normed: whether the final norm follows an earlier layer, as SD 1.x's clip_skip has it.
    """

    def __init__(
        self, model: Any, *, skip: int | None = None, pooled: bool = False, normed: bool = False
    ) -> None:
        super().__init__()
        self.model, self.skip, self.pooled, self.normed = model, skip, pooled, normed

    def forward(self, input_ids: Tensor) -> Any:
        """[N, T] to states [N, T, D], and pooled [N, P] where it is asked for."""
        found = self.model(input_ids, output_hidden_states=self.skip is not None)
        if self.skip is None:
            states = found.last_hidden_state
        else:
            states = found.hidden_states[-(self.skip + 2)]
            if self.normed:
                states = _final_norm(self.model)(states)
        return (states, found[0]) if self.pooled else states


class MaskedStates(nn.Module):
    """A BERT-like encoder: the last layer's states, times a factor; padding is masked."""

    def __init__(self, model: Any, scale: float = 1.0) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[N, T] twice to states [N, T, D]."""
        found = self.model(input_ids=input_ids, attention_mask=attention_mask)
        states: Tensor = found.last_hidden_state * self.scale
        return states


def _final_norm(model: Any) -> Any:
    """CLIP's; transformers 5 has no ``text_model`` between a CLIPTextModel and it."""
    return getattr(model, "text_model", model).final_layer_norm
