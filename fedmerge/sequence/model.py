"""A causal Transformer over histories of items, whose items are ids, text vectors, or both."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, cast

import torch
from torch import nn

from fedmerge.errors import LayoutMismatchError
from fedmerge.sequence.catalog import by_blocks, mean_and_covariance

Inputs = Literal["ids", "text", "text+ids"]
INITIAL_STD = 0.02
WHITENED_WIDTH = 128  # principal components of the text vectors that are read


@dataclass(frozen=True, slots=True)
class SequenceSettings:
    """Size and training of a sequence model, selected on validation users (docs/results.md, docs/reference/heads.md).

    Attributes:
        inputs: parts of an item's representation.
        hidden_size: size h of a representation, a multiple of ``heads``.
        layers: number of Transformer blocks.
        heads: attention heads per block.
        dropout: share of values dropped in training.
        id_dropout: share of items that training shows without their id; only with ``text+ids``.
        max_length: number of most recent items read of a history.
        learning_rate: Adam learning rate.
        batch_size: users per step.
        max_epochs: largest number of passes over the users.
        max_minutes: wall-clock limit or None; if it ends the training, the model depends on the machine's speed.
        validation_users: validation users for early stopping after every epoch; None: all.
        patience: epochs without a better NDCG@10 before training stops.
        sampled_items: items drawn for the softmax of a step; None: all.
    """

    inputs: Inputs = "ids"
    hidden_size: int = 128
    layers: int = 2
    heads: int = 2
    dropout: float = 0.5
    id_dropout: float = 0.2
    max_length: int = 50
    learning_rate: float = 1e-3
    batch_size: int = 64
    max_epochs: int = 100
    max_minutes: float | None = None
    validation_users: int | None = None
    patience: int = 5
    sampled_items: int | None = None

    def record(self) -> dict[str, Any]:
        """Return the settings as JSON types, for the key of a cache; a softmax over all items is left out."""
        return {key: value for key, value in asdict(self).items() if key != "sampled_items" or value is not None}


class SequenceModel(nn.Module):
    """Causal Transformer over histories; an item's score is the inner product of hidden state and representation.

    r_i = MLP(whitened text vector of i) + id embedding of i;  score of i after position s = <hidden state at s, r_i>

    With ``inputs = "ids"`` this is SASRec. With ``inputs = "text+ids"`` the id part of an item without training
    interactions is zero, so such an item is read and scored by its text alone.

    Attributes:
        settings: widths, depth and dropout.
        num_items: N.
        items: id embeddings (N, h), absent with ``inputs = "text"``.
        trained_items: (N,) bool with ``text+ids``: the items that have an id part. Training sets it.

    Source: Kang and McAuley, Self-attentive sequential recommendation, ICDM 2018; text vectors through a small network
        as in LLM2Rec, arXiv:2506.21579.
    Differs: layer normalisation before attention also on keys and values, as in later Transformers; histories are
        padded on the right and positions count from the oldest item that is read, so that padding needs no mask besides
        the causal one. LLM2Rec has no ids.
    """

    item_vectors: torch.Tensor
    text_mean: torch.Tensor
    text_axes: torch.Tensor
    whitened: torch.Tensor
    trained_items: torch.Tensor

    def __init__(
        self,
        num_items: int,
        settings: SequenceSettings,
        item_vectors: torch.Tensor | None = None,
        whitening: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        """Draw fresh weights from PyTorch's global generator.

        Args:
            num_items: N.
            settings: inputs, widths, depth and dropout.
            item_vectors: (N, d) text vectors; ignored with ``inputs = "ids"``. They are frozen and not in the state
                dict, which has their whitening.
            whitening: ``text_mean`` (d,) and ``text_axes`` (d, k) of a model that was trained on another catalog; None:
                those of ``item_vectors``.

        Raises:
            LayoutMismatchError: text vectors are missing, or not one for each item.
        """
        super().__init__()
        width = settings.hidden_size
        self.settings, self.num_items = settings, num_items
        if settings.inputs != "text":
            self.items = nn.Embedding(num_items, width)
        self.positions = nn.Embedding(settings.max_length, width)
        self.dropout = nn.Dropout(settings.dropout)
        block = nn.TransformerEncoderLayer(
            width, settings.heads, width, settings.dropout, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, settings.layers, nn.LayerNorm(width), enable_nested_tensor=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # TransformerEncoder copies one block, weights included, so each block is drawn again.
                if name.startswith("blocks"):
                    nn.init.xavier_uniform_(parameter)
                else:
                    nn.init.normal_(parameter, std=INITIAL_STD)
        if settings.inputs == "ids":
            return
        if item_vectors is None or item_vectors.ndim != 2 or len(item_vectors) != num_items:
            found = "none" if item_vectors is None else f"shape {tuple(item_vectors.shape)}"
            raise LayoutMismatchError(
                f"a sequence model with inputs '{settings.inputs}' needs text vectors of shape ({num_items}, d): found "
                f"{found}. Pass one vector for each item of the catalog, or use inputs 'ids'"
            )
        vectors = item_vectors.detach().float()
        mean, axes = whitening or _whitening(vectors)
        self.register_buffer("item_vectors", vectors, persistent=False)
        self.register_buffer("text_mean", mean)
        self.register_buffer("text_axes", axes)
        self.register_buffer("whitened", by_blocks(lambda block: (block - mean) @ axes, vectors), persistent=False)
        # The whitening of the catalog of training is stored, so that items added later change nothing for others.
        self.register_load_state_dict_post_hook(_whiten_again)  # type: ignore[no-untyped-call]  # PyTorch's
        self.text_map = nn.Sequential(nn.Linear(axes.shape[1], 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        if settings.inputs == "text+ids":
            self.register_buffer("trained_items", torch.ones(num_items, dtype=torch.bool))

    def base(self, items: torch.Tensor | None = None) -> torch.Tensor:
        """Return the first part of representations: of texts, or of ids in a model on ids alone.

        Args:
            items: (n,) items; None: all.

        Returns:
            (n, h).
        """
        if self.settings.inputs == "ids":
            return self.items.weight if items is None else cast("torch.Tensor", self.items(items))
        if items is None and not torch.is_grad_enabled():
            return by_blocks(self.text_map, self.whitened)
        return cast("torch.Tensor", self.text_map(self.whitened if items is None else self.whitened[items]))

    def item_representations(self, base: torch.Tensor | None = None, items: torch.Tensor | None = None) -> torch.Tensor:
        """Return the representations that states are scored against, (N, h).

        In training each id part is left out with probability ``id_dropout``, drawn once per item and call.

        Args:
            base: :meth:`base` of the items, if already computed.
            items: (n,) items; None: all.
        """
        base = self.base(items) if base is None else base
        if self.settings.inputs != "text+ids":
            return base
        if items is None:
            return base + self.items.weight * self._kept(self.trained_items)
        ids: torch.Tensor = self.items(items)
        return base + ids * self._kept(self.trained_items[items])

    def forward(
        self, histories: torch.Tensor, base: torch.Tensor | None = None, items: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the hidden states after each item.

        In training each id part is left out with probability ``id_dropout``, drawn for every item that is read.

        Args:
            histories: (b, t) int64 item indices, oldest first, padded on the right with any item; t at most max_length.
            base: :meth:`base` of the items, if already computed.
            items: (n,) items that the histories count among; None: all.

        Returns:
            (b, t, h); position s has read items 0 .. s and nothing later.
        """
        read = nn.functional.embedding(histories, self.base(items) if base is None else base)  # (b, t, h)
        if self.settings.inputs == "text+ids":
            of_catalog = histories if items is None else items[histories]
            read = read + self.items(of_catalog) * self._kept(self.trained_items[of_catalog])
        length = histories.shape[1]
        hidden = read * math.sqrt(self.settings.hidden_size) + self.positions.weight[:length]
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=histories.device)  # (t, t)
        encoded: torch.Tensor = self.blocks(self.dropout(hidden), mask=causal, is_causal=True)
        return encoded

    def _kept(self, trained: torch.Tensor) -> torch.Tensor:
        """Return trained with one more axis as 0 or 1, in training with some ones turned to zero."""
        if self.training:
            trained = trained & (torch.rand(trained.shape, device=trained.device) >= self.settings.id_dropout)
        return trained[..., None].float()


def _whitening(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean (d,) and axes (d, k): (x - mean) @ axes has mean 0, variance 1 and no correlation in the catalog.

    k is WHITENED_WIDTH or the rank of the centred vectors, if that is smaller.
    """
    mean, covariance = mean_and_covariance(vectors)
    values, axes = torch.linalg.eigh(covariance)  # ascending
    kept = max(1, min(WHITENED_WIDTH, int((values > 1e-6 * values[-1]).sum())))
    largest = values[-kept:].flip(0)
    if largest[0] <= 1e-12:  # one item or equal texts: no direction to scale, else an added item would be enormous
        return mean.float(), axes.new_zeros(axes.shape[0], kept).float()
    return mean.float(), (axes[:, -kept:].flip(1) / largest.sqrt()).float()


def _whiten_again(model: nn.Module, _: object) -> None:
    if not isinstance(model, SequenceModel):
        raise TypeError(type(model))
    model.whitened = by_blocks(lambda block: (block - model.text_mean) @ model.text_axes, model.item_vectors)
