"""Pseudo-users: token sequences made from a catalog alone, with what the domain's own expert thinks of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import encode
from fedmerge.encoder.lora import Adapter, applied
from fedmerge.encoder.text import Tokens, TokenTable, item_sequences
from fedmerge.errors import DomainError


@dataclass(frozen=True, slots=True)
class PseudoDomain:
    """The pseudo-users of one domain and their teacher.

    Attributes:
        name: the domain.
        sequences: N token sequences, int32; pseudo-user i has seen item i alone, so its text is the text of item i.
        teacher_items: (N, d) float32, the items' vectors under the domain's own expert, L2-normalised; row i is also
            the teacher's vector of pseudo-user i.
    """

    name: str
    sequences: Sequence[Tokens]
    teacher_items: torch.Tensor

    def __post_init__(self) -> None:
        found, expected = tuple(self.teacher_items.shape), len(self.sequences)
        if self.teacher_items.ndim != 2 or found[0] != expected or expected == 0:
            raise DomainError(
                f"pseudo-users of {self.name!r}: found {expected} sequences and teacher vectors of shape {found}, "
                "expected one vector a sequence and at least one sequence; encode the same catalog"
            )
        norms = torch.linalg.vector_norm(self.teacher_items, dim=1)
        if not torch.allclose(norms, torch.ones_like(norms), atol=1e-3):
            worst = int((norms - 1).abs().nan_to_num(torch.inf).argmax())
            raise DomainError(
                f"pseudo-users of {self.name!r}: the teacher vector of item {worst} has norm "
                f"{float(norms[worst]):.4g}, expected 1; use the vectors that encode returns"
            )


def one_item_domain(name: str, backbone: Backbone, expert: Adapter, table: TokenTable, max_tokens: int) -> PseudoDomain:
    """The paper's pseudo-users, every item as a sequence of its own, from a catalog and the domain's expert only.

    Args:
        name: the domain.
        backbone: the frozen encoder; left as it was.
        expert: the domain's own adapter.
        table: token table of its catalog, N items.
        max_tokens: longest sequence.

    Returns:
        N pseudo-users with the expert's (N, d) vectors.

    Source: arXiv:2601.01753, pseudo-users.
    Differs: the released code keeps an N × N matrix of teacher scores; these are the vectors it is the product of.
    """
    sequences = item_sequences(table, backbone.special, max_tokens)
    with applied(backbone, expert):
        return PseudoDomain(name, sequences, encode(backbone, sequences))
