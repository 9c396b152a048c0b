"""RecFormer: a Longformer that also knows what is key and what is value, and which item a token belongs to."""

from typing import Any

import torch
from transformers import LongformerConfig, LongformerModel
from transformers.models.longformer.modeling_longformer import LongformerBaseModelOutputWithPooling

# What the authors set over the configuration of longformer-base-4096, which they save beside no checkpoint.
_SETTINGS: dict[str, Any] = {"token_type_size": 4, "max_item_embeddings": 51, "max_token_num": 1024}
_WINDOW = 64


class RecFormerModel(LongformerModel):
    """The encoder with the authors' names of tensors, without a pooler.

    The embedding of a token is the LayerNorm of word + position + type + item position.

    Source: Li et al., Text Is All You Need, KDD 2023 (arXiv:2305.13731), and the authors' code.
    """

    def __init__(self, config: LongformerConfig, add_pooling_layer: bool = False) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        items = torch.nn.Embedding(config.max_item_embeddings, config.hidden_size)
        self.embeddings.item_position_embeddings = items
        self.post_init()  # type: ignore[no-untyped-call]  # of transformers

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        item_position_ids: torch.Tensor | None = None,
        global_attention_mask: torch.Tensor | None = None,
        **options: Any,
    ) -> LongformerBaseModelOutputWithPooling:
        """Encode a batch.

        Args:
            input_ids: (n, tokens).
            attention_mask: (n, tokens), 1 for tokens and 0 for padding; None: no padding.
            token_type_ids: (n, tokens), 0 for the first token, 1 in keys, 2 in values, 3 for padding; None: all 0.
            item_position_ids: (n, tokens), 0 for the first token, 1 in the newest item; None: all 0.
            global_attention_mask: (n, tokens), 1 for tokens that all see and that see all.
            options: of transformers.

        Returns:
            Its ``last_hidden_state`` is (n, tokens, d): the padding to whole windows is removed again.
        """
        table: Any = self.embeddings  # PyTorch does not know the types of submodules
        items = torch.zeros_like(input_ids) if item_position_ids is None else item_position_ids
        present = (input_ids != table.padding_idx).long()
        positions = present.cumsum(dim=1) * present + table.padding_idx
        found: LongformerBaseModelOutputWithPooling = super().forward(
            inputs_embeds=table.word_embeddings(input_ids) + table.item_position_embeddings(items),
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=positions,
            global_attention_mask=global_attention_mask,
            **options,
        )
        return found


def complete(config: LongformerConfig) -> LongformerConfig:
    """Return a RecFormer's configuration, completed in place: that of a bare Longformer gets the authors' settings."""
    if getattr(config, "max_item_embeddings", None) is None:
        config.attention_window = [_WINDOW] * config.num_hidden_layers
    for name, value in _SETTINGS.items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    config.type_vocab_size = config.token_type_size
    return config
