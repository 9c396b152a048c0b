"""CSFT, collaborative supervised fine-tuning: a decoder predicts the next item's title from those of the history.

L = −Σ log p(token | history, earlier tokens of the target) / number of target tokens in the batch; the tokens of the
history have no loss. Attention is causal, also where the backbone is switched to both ways for its vectors.

Source: LLM2Rec, KDD 2025, arXiv:2506.21579.
Differs: LoRA in place of full fine-tuning; titles and histories are cut as in all texts here; the best step on
    validation is kept, where the released code takes the last one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fedmerge.client.local_domain import LocalDomain
from fedmerge.client.training.batches import Batch
from fedmerge.config import CSFT, Train
from fedmerge.llm2rec.head import LanguageHead, language_head, token_losses
from fedmerge.llm2rec.titles import end_token, next_title_sequences, titles_of


@dataclass(frozen=True, eq=False)
class NextTitles:
    """What CSFT needs beside a batch: the titles of the domain's items, and the head of the decoder."""

    titles: list[str]
    head: LanguageHead


NO_TITLES: Mapping[str, NextTitles] = {}


def next_titles(settings: Train, *domains: LocalDomain) -> Mapping[str, NextTitles]:
    """Return domain -> what CSFT needs; empty for another objective.

    Args:
        settings: ``[train]``.
        domains: that share a backbone.

    Raises:
        BackboneError: no decoder, no language-model head, or no end-of-sequence token.
    """
    if settings.objective != "csft":
        return NO_TITLES
    backbone = domains[0].backbone
    head = language_head(backbone, CSFT)
    end_token(backbone)
    return {
        domain.manifest.name: NextTitles(
            titles_of(domain.catalog, backbone.tokenizer, domain.text.max_attribute_tokens), head
        )
        for domain in domains
    }


def csft_loss(domain: LocalDomain, of_domain: NextTitles, batch: Batch) -> torch.Tensor:
    """Return the mean loss of the target tokens of a batch under the backbone as it is, differentiable.

    Args:
        domain: the client's domain.
        of_domain: of :func:`next_titles`.
        batch: users of the step.
    """
    titles, text = of_domain.titles, domain.text
    histories = [[titles[item] for item in history[-text.max_items :]] for history in batch.histories]
    targets = [titles[item] for item in batch.targets]
    sequences, lengths = next_title_sequences(domain.backbone, histories, targets, text.max_tokens)
    positions = [
        range(max(1, len(sequence) - length), len(sequence))
        for sequence, length in zip(sequences, lengths, strict=True)
    ]
    tokens = [sequence[of.start :].tolist() for sequence, of in zip(sequences, positions, strict=True)]
    losses = token_losses(domain.backbone, of_domain.head, sequences, positions, tokens, hide_later=True)
    return losses.sum() / sum(map(len, positions))
