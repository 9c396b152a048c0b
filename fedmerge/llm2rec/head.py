"""The language-model head of a decoder, which a backbone is loaded without, and the loss of single tokens under it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open

from fedmerge.encoder.attention import causal
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import hidden_states, in_groups
from fedmerge.encoder.families import check_decoder
from fedmerge.encoder.text import Tokens
from fedmerge.errors import BackboneError

STORED = ("lm_head", "embed_out")  # the second is GPT-NeoX's


@dataclass(frozen=True, eq=False)
class LanguageHead:
    """The frozen map from a token's state to the logits of the next token.

    Attributes:
        weight: (V, d).
        bias: (V,), or None.
        softcap: c of c · tanh(logits / c), as Gemma 2 has it; None: no such limit.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    softcap: float | None = None

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits (n, V) of states (n, d), in float32."""
        logits = torch.nn.functional.linear(states.to(self.weight.dtype), self.weight, self.bias).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def language_head(backbone: Backbone, asked: str) -> LanguageHead:
    """Return the head of a decoder: that of its files, else its token embeddings where it ties both.

    Args:
        backbone: the encoder.
        asked: the setting that needs a head, for the message.

    Raises:
        BackboneError: no decoder, or its files hold no head and it ties none.
    """
    model: Any = backbone.model
    config, compute = model.config, backbone.compute
    check_decoder(config.model_type, backbone.name, asked)
    stored = _stored(backbone)
    weight, bias = stored.get("weight"), stored.get("bias")
    if weight is None and config.tie_word_embeddings:
        weight = model.get_input_embeddings().weight.detach()
    if weight is None:
        raise BackboneError(
            f"backbone {backbone.name}: {asked} needs the language-model head, but {backbone.folder} holds no "
            f"{STORED[0]}.weight and config.json does not say tie_word_embeddings = true: the model was saved as an "
            "encoder alone. Take the causal model that it was made from, or set train.objective = 'infonce'."
        )
    dtype = compute.autocast_dtype or torch.float32
    weight = weight.to(compute.device, dtype)
    bias = None if bias is None else bias.to(compute.device, dtype)
    return LanguageHead(weight, bias, getattr(config, "final_logit_softcapping", None))


def _stored(backbone: Backbone) -> dict[str, torch.Tensor]:
    """Return weight and bias of the head as far as the files hold them."""
    wanted = {f"{name}.{part}": part for name in STORED for part in ("weight", "bias")}
    found: dict[str, torch.Tensor] = {}
    for path in sorted(backbone.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {wanted[key]: file.get_tensor(key) for key in file.keys() if key in wanted}  # noqa: SIM118
    return found


def token_losses(
    backbone: Backbone,
    head: LanguageHead,
    sequences: Sequence[Tokens],
    positions: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    *,
    hide_later: bool,
) -> torch.Tensor:
    """Compute −Σ log p(token at i | state at i − 1) of each sequence, differentiably.

    Args:
        backbone: a decoder.
        head: its head.
        sequences: n token sequences, special tokens included.
        positions: of each sequence, the positions i ≥ 1 that are predicted; may be empty.
        tokens: of each sequence, the token that is right at each of them.
        hide_later: True for causal attention, also in a model that attends both ways.

    Returns:
        float32 (n,), sums of natural logarithms.
    """

    def of_group(group: Sequence[int]) -> torch.Tensor:
        # the direction is set here, since a group may be computed again for its gradient
        with causal(backbone.model, switched=backbone.is_switched and hide_later):
            hidden, _ = hidden_states(backbone, [sequences[i] for i in group])  # (g, longest, d)
        counts = [len(positions[i]) for i in group]
        rows = torch.arange(len(group)).repeat_interleave(torch.tensor(counts))
        places = torch.tensor([position - 1 for i in group for position in positions[i]], dtype=torch.int64)
        right = torch.tensor([token for i in group for token in tokens[i]], dtype=torch.int64)
        states = hidden[rows.to(hidden.device), places.to(hidden.device)]  # (t, d)
        losses = torch.nn.functional.cross_entropy(head(states), right.to(hidden.device), reduction="none")
        return torch.stack([part.sum() for part in torch.split(losses, counts)])

    return in_groups(backbone, sequences, of_group)
