"""A text encoder of the standalone host: how Stable Diffusion reads it, and vectors in the place of words.

Leans on the forward hook of `token_embedding`, `hidden_states` and `final_layer_norm` of transformers' CLIP text
models (4.30 to 5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from lib_estimate.prompt.cleaning import Clean

Splice = tuple[int, Mapping[str, Tensor]]
"""Index of the first place, and an embedding's vectors `{encoder: [N, width]}`."""


@dataclass
class TextEncoder:
    """A CLIP text model and which of its layers the U-Net is given."""

    key: str  # as in embedding files
    model: CLIPTextModel | CLIPTextModelWithProjection
    pad: int  # token id that fills a chunk behind its end token
    layer: int  # counted from the end: 1 is the last
    normed: bool  # whether the model's last norm is applied to that layer
    clip_skip: bool  # whether the user's clip skip moves the layer
    pooled: bool  # whether the U-Net gets the projected state at the end token as well
    clean: Clean  # what happens to a text before it becomes tokens

    def __post_init__(self) -> None:
        body = getattr(self.model, "text_model", self.model)
        self.table: nn.Embedding = body.embeddings.token_embedding
        self.final_norm: nn.LayerNorm = body.final_layer_norm
        self._spliced: Sequence[Sequence[Splice]] = ()

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def places(self) -> int:
        """Tokens in a chunk, with start and end."""
        return self.model.config.max_position_embeddings

    def watch(self) -> torch.utils.hooks.RemovableHandle:
        """From now on vectors can stand in the place of words; until the handle is removed."""
        return self.table.register_forward_hook(self._splice)

    def states(
        self, ids: Tensor, end: int, placed: Sequence[Sequence[Splice]], layer: int
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states `[B, T, C]` of a layer and the pooled vector `[B, P]`, float32, for token ids `[B, T]`.

        end: id of the end token. placed: the embeddings in each row. The pooled vector is the projection of the last
        layer at the first end token.
        """
        at_end = (ids == end).int().argmax(1)
        self._spliced = placed
        try:
            padded = ids if self.pad == end else self._padded(ids, at_end)
            out = self.model(input_ids=padded, output_hidden_states=True)
        finally:
            self._spliced = ()
        if not self.normed:
            z = out.hidden_states[-layer]
        else:
            z = out.last_hidden_state if layer == 1 else self.final_norm(out.hidden_states[-layer])
        if not self.pooled:
            return z.float(), None
        last = out.last_hidden_state[torch.arange(len(ids), device=ids.device), at_end]
        return z.float(), self.model.text_projection(last).float()

    def _padded(self, ids: Tensor, at_end: Tensor) -> Tensor:
        behind = torch.arange(ids.shape[1], device=ids.device)[None] > at_end[:, None]
        return ids.masked_fill(behind, self.pad)

    def _splice(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        """Puts vectors over the places that embeddings take, `[B, T, C]`."""
        if not any(self._spliced):
            return out
        rows = []
        for row, placed in zip(out, self._spliced, strict=True):
            for offset, vectors in placed:
                # A webui cuts off what hangs over the chunk's end.
                own = vectors[self.key][: len(row) - 1 - offset].to(row)
                row = torch.cat([row[:offset], own, row[offset + len(own) :]])
            rows.append(row)
        return torch.stack(rows)
