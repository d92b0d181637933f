"""`Ministral3Model`: one chunk of a Ministral 3, as a `MegatronModule`.

A first chunk holds the vision tower, the projector and the embedding, a last one the final norm and the output layer,
each of them some decoder layers. What one chunk gives is what the next takes in `set_input_tensor`: hidden states
`[T, 1, H]` of a packed token stream. Legend as in `packed`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ray_ministral.config import StageSpec
from ray_ministral.model import language, vision
from ray_ministral.model.architecture import Architecture, check_config
from ray_ministral.model.attention import CausalAttention, PackedAttentionParams
from ray_ministral.model.matmul import onednn_serves
from ray_ministral.model.megatron_core import MegatronModule
from ray_ministral.model.packed import PackedBatch, Padding
from ray_ministral.model.rope import Rotary

if TYPE_CHECKING:
    from transformers import Mistral3Config

IGNORE_INDEX = -100
"""A label that asks for no prediction, as in Hugging Face and torch."""


class Ministral3Model(MegatronModule):  # type: ignore[misc]  # megatron ships no types
    """A chunk of Ministral 3: vision tower and projector (Hugging Face), decoder layers (Megatron-core).

    config: Hugging Face's `Mistral3Config`, kept as `hf_config`; `self.config` is Megatron's `TransformerConfig`.
    pre_process, post_process: whether this chunk is the first, the last, both or neither.
    vp_stage: number of this chunk within its pipeline stage, where a stage has several; else None.
    stage: which decoder layers it holds; all of them when left out.
    dtype, device: of the parameters. initialize: draw random weights (off where weights are loaded next).
    share_output_layer: on a chunk with both ends of a tied model, whether they are one parameter; two, each with a
    gradient of its own, for training.
    """

    def __init__(
        self,
        config: Mistral3Config,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        *,
        stage: StageSpec | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        initialize: bool = True,
        share_output_layer: bool = True,
    ) -> None:
        check_config(config)
        num_layers = Architecture.from_config(config).num_layers
        if stage is None:
            stage = StageSpec(0, num_layers, pre_process, post_process)
        elif stage.end_layer > num_layers:
            raise ValueError(
                f"stage has layers {stage.first_layer} to {stage.end_layer - 1}, the model has {num_layers}: "
                "make the partition from this model's config"
            )
        device = torch.device(device)
        with torch.device("meta"):
            language_model = language.build_language_model(
                config, stage, dtype, torch.device("meta"), share_output_layer=share_output_layer
            )
            vision_tower, projector = vision.build_vision(config) if stage.is_first else (None, None)
        super().__init__(config=language_model.config)
        self.hf_config = config
        self.stage = stage
        self.pre_process = stage.is_first
        self.post_process = stage.is_last
        self.vp_stage = vp_stage
        self.share_embeddings_and_output_weights = language_model.share_embeddings_and_output_weights
        self.language_model = language_model
        if vision_tower is not None:
            self.vision_tower = vision_tower
            self.multi_modal_projector = projector
        self._materialize(dtype, device)
        self._rotary = Rotary(config)
        if initialize:
            self.reset_parameters()

    @classmethod
    def from_pretrained(
        cls,
        model_dir: str | os.PathLike[str],
        stage: StageSpec | None = None,
        *,
        vp_stage: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Ministral3Model:
        """Load one chunk, reading only its own tensors; the whole model when `stage` is left out.

        Raises `ModelError` for a directory, config or tensor that does not fit.
        """
        from ray_ministral.model.weights import load_chunk

        return load_chunk(model_dir, stage, vp_stage=vp_stage, dtype=dtype, device=device)

    def _materialize(self, dtype: torch.dtype, device: torch.device) -> None:
        """Give every parameter its memory, each once (a tied one stays tied); fresh buffers for the vision tower."""
        made: dict[nn.Parameter, nn.Parameter] = {}
        for module in self.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if parameter not in made:
                    empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                    made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                setattr(module, name, made[parameter])
        if self.pre_process:
            self.vision_tower.patch_positional_embedding = vision.rotary_embedding(self.hf_config).to(device)

    def reset_parameters(self) -> None:
        """Random weights as Hugging Face draws them: norms one, the rest normal with `initializer_range`."""
        text: Any = self.hf_config.text_config
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if "norm" in name or "ln_pre" in name:
                    parameter.fill_(1)
                elif parameter.ndim == 1:
                    parameter.zero_()
                else:
                    parameter.normal_(0, text.initializer_range)

    def freeze(self, freeze_language_model: bool, freeze_vision_model: bool, freeze_vision_projection: bool) -> None:
        """Stop gradients to the named parts; a part that this chunk does not hold is passed over."""
        frozen: list[Any] = []
        if freeze_language_model:
            frozen.append(self.language_model)
        if freeze_vision_model and self.pre_process:
            frozen.append(self.vision_tower)
        if freeze_vision_projection and self.pre_process:
            frozen.append(self.multi_modal_projector)
        for module in frozen:
            module.requires_grad_(False)

    def pack(self) -> None:
        """Lay the weights out for inference on this CPU; without effect on another device.

        Faster (see `matmul`), and final: no gradients, and the weights have no names any more.
        """
        if not onednn_serves(next(self.parameters()).device, self.config.params_dtype):
            return
        language.pack(self.language_model)
        if self.pre_process:
            vision.pack(self.vision_tower, self.multi_modal_projector)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Hidden states `[T, 1, H]` of the chunk before, for the next `forward`."""
        self.language_model.set_input_tensor(input_tensor)

    def get_image_features(
        self, pixel_values: Tensor | Sequence[Tensor], image_sizes: Tensor | Sequence[Sequence[int]] | None = None
    ) -> tuple[Tensor, ...]:
        """Features `[tokens, H]` of each image.

        pixel_values: normalised images, `[N, 3, height, width]` (padded to the largest; then `image_sizes` `[N, 2]`
        says how much of each counts) or a sequence of `[3, height, width]`.
        """
        if not self.pre_process:
            raise ValueError("only the first stage has a vision tower: ask stage 0 for image features")
        images = vision.unpad(pixel_values, image_sizes)
        layer: Any = self.hf_config.vision_feature_layer
        features = vision.encode_images(self.vision_tower, self.multi_modal_projector, images, feature_layer=layer)
        return tuple(features)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        labels: Tensor | None = None,
        runtime_gather_output: bool | None = None,  # noqa: ARG002
        image_sizes: Tensor | Sequence[Sequence[int]] | None = None,
        *,
        loss_mask: Tensor | None = None,
        packed: PackedBatch | None = None,
    ) -> Tensor:
        """Run the chunk; the plain form as a user of Hugging Face would call it, or a packed batch.

        Plain: `input_ids` `[B, S]` (or `inputs_embeds` `[B, S, H]`), `attention_mask` `[B, S]` of 0 and 1,
        `position_ids` `[B, S]` (0 to S-1 when left out), `labels` `[B, S]` unshifted with -100 for "no prediction".
        A chunk that is not the first takes its lengths from `attention_mask` (or the shape of any of these).
        Packed: `packed`, with `labels` `[T]` that say what each token should predict (shifted already).

        Returns the mean loss over the labels that count (`loss_mask`, shaped as the labels, may leave out more; 0 where
        none is left) if there are labels, else logits (`[B, S, V]` with zeros at the padding; packed: `[rows, V]`);
        on a chunk that is not the last, hidden states `[T, 1, H]`. `runtime_gather_output` is Megatron's and has no
        effect: the output layer is whole.
        """
        if packed is not None:
            output = self._forward_packed(packed)
            if labels is None or not self.post_process:
                return output
            return _mean_loss(output, labels, loss_mask)

        padding, packed = self._pack(input_ids, attention_mask, position_ids, inputs_embeds, pixel_values, image_sizes)
        embeds_T1H = None if inputs_embeds is None else padding.pack(inputs_embeds).unsqueeze(1)
        output = self._forward_packed(packed, embeds_T1H)
        if not self.post_process:
            return output
        if labels is None:
            return padding.unpack(output)
        shifted = _shift_left(labels, IGNORE_INDEX)
        mask_T = None if loss_mask is None else padding.pack(_shift_left(loss_mask, 0))
        return _mean_loss(output, padding.pack(shifted), mask_T)

    def _forward_packed(self, batch: PackedBatch, embeds_T1H: Tensor | None = None) -> Tensor:
        """Logits `[rows, V]` on a last chunk, else hidden states `[T, 1, H]`."""
        hidden = self._embed(batch, embeds_T1H) if self.pre_process else None
        params = PackedAttentionParams(
            rotary=self._rotary.tables(batch.positions_T, self.config.params_dtype),
            context=batch.attention or CausalAttention(batch.lengths),
        )
        hidden = language.run_layers(self.language_model, hidden, params)
        if not self.post_process:
            return hidden
        return language.logits(self.language_model, hidden, batch.logit_rows)

    def _embed(self, batch: PackedBatch, embeds_T1H: Tensor | None) -> Tensor:
        """Token embeddings `[T, 1, H]` with the features of the images at their placeholders."""
        if embeds_T1H is None:
            if batch.token_ids_T is None:
                raise ValueError("a first stage needs token ids (or inputs_embeds), got none")
            embeds_T1H = language.embed(self.language_model, batch.token_ids_T)
        if not batch.images:
            return embeds_T1H
        features = torch.cat(self.get_image_features(batch.images)).to(embeds_T1H.dtype)
        image_token = self.hf_config.image_token_index
        if batch.token_ids_T is not None:
            is_image_T = batch.token_ids_T == image_token
        else:
            placeholder = language.embed(self.language_model, torch.tensor([image_token], device=embeds_T1H.device))
            is_image_T = (embeds_T1H == placeholder).all(-1).squeeze(1)
        is_image_T[: batch.prompt_start] = False
        placeholders = int(is_image_T.sum())
        if placeholders != features.shape[0]:
            raise ValueError(
                f"{len(batch.images)} images give {features.shape[0]} features for {placeholders} image tokens "
                f"(id {image_token}): the prompt must have one for each merged patch"
            )
        return embeds_T1H.masked_scatter(is_image_T[:, None, None], features)

    def _pack(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        pixel_values: Tensor | Sequence[Tensor] | None,
        image_sizes: Tensor | Sequence[Sequence[int]] | None,
    ) -> tuple[Padding, PackedBatch]:
        shaped = next((x for x in (input_ids, inputs_embeds, attention_mask, position_ids) if x is not None), None)
        if shaped is None:
            raise ValueError(
                "cannot tell sequences apart: give input_ids or inputs_embeds, or on a later stage attention_mask or "
                "position_ids, of shape [B, S]"
            )
        shape = (shaped.shape[0], shaped.shape[1])
        padding = Padding.of(shape, attention_mask, shaped.device)
        if position_ids is None:
            position_ids = torch.arange(shape[1], device=shaped.device)
        images = () if pixel_values is None or not self.pre_process else vision.unpad(pixel_values, image_sizes)
        return padding, PackedBatch(
            positions_T=padding.pack(position_ids.expand(shape)),
            lengths=padding.lengths,
            token_ids_T=None if input_ids is None else padding.pack(input_ids),
            images=images,
        )


def _shift_left(values_BS: Tensor, fill: int) -> Tensor:
    """What position s should predict stands at s + 1."""
    return torch.nn.functional.pad(values_BS[:, 1:], (0, 1), value=fill)


def _mean_loss(logits_TV: Tensor, labels_T: Tensor, loss_mask_T: Tensor | None) -> Tensor:
    """Mean cross entropy over the labels that count, in fp32; 0 (with a gradient of 0) where none counts."""
    losses_T = cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORE_INDEX, reduction="none")
    weight_T = (labels_T != IGNORE_INDEX).to(losses_T.dtype)
    if loss_mask_T is not None:
        weight_T = weight_T * loss_mask_T.to(losses_T.dtype)
    return (losses_T * weight_T).sum() / weight_T.sum().clamp(min=1)
