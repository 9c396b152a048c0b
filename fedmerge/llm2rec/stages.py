"""The server's stages on a merge: MNTP, then SimCSE, on titles of public catalogs; no user is read.

The merge is folded into the frozen backbone, and a fresh LoRA is trained over it, so a merge of any rank can be
continued; the result is Δ_merge + Δ_stages. Attention goes both ways, as the backbone is served.

MNTP    −(1 / number of chosen tokens) Σ log p(token at i | state at i − 1), titles with masked tokens
SimCSE  −(1/B) Σ_i log [exp(cos(a_i, b_i) / τ) / Σ_j exp(cos(a_i, b_j) / τ)], a and b two passes under attention dropout

Source: LLM2Rec, KDD 2025, arXiv:2506.21579, after LLM2Vec, arXiv:2404.05961.
Differs: LoRA in place of full fine-tuning; on the server's merge in place of one model that was trained on all domains.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fedmerge.adapter import Adapter
from fedmerge.config import Lora, Mntp, Simcse
from fedmerge.encoder.attention import attention_dropout, dropping_layers
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.encode import embed_in_groups
from fedmerge.encoder.families import check_decoder
from fedmerge.encoder.fast.frozen import frozen_products, using
from fedmerge.encoder.lora import adapter_of, applied, attach
from fedmerge.encoder.text import leading_blank, tokenise
from fedmerge.errors import BackboneError, MergeError
from fedmerge.llm2rec.head import LanguageHead, language_head, token_losses
from fedmerge.llm2rec.masking import Title, mask_token, masked
from fedmerge.seeding import generator
from fedmerge.tensor_files import read_tensors, restore, state_tensors, write_tensors

STYLE = "LLM2Rec-style (arXiv:2506.21579): MNTP and SimCSE with LoRA on a merge, from titles of public catalogs"
CLIP = 1.0  # norm of a step's gradient
KEPT_EVERY = 50  # steps between two checkpoints

Losses = dict[str, list[float]]
"""Stage -> the loss of each step."""


@dataclass(frozen=True)
class StageSettings:
    """The settings of an experiment that the stages depend on.

    Attributes:
        mntp, simcse: sections of the configuration.
        lora: layout of what is trained; its rank adds to that of the merge.
        seed: seed of all draws.
    """

    mntp: Mntp
    simcse: Simcse
    lora: Lora
    seed: int

    @property
    def names(self) -> tuple[str, ...]:
        """The stages that are on, in order."""
        return tuple(name for name in ("mntp", "simcse") if getattr(self, name).steps)


def check_stages(backbone: Backbone, mntp: Mntp, simcse: Simcse) -> None:
    """Refuse a backbone that the stages cannot train as it is served.

    Raises:
        BackboneError: no decoder, attention that is causal, another pooling than the mean, no language-model head, no
            token to mask with, or an attention without dropout.
    """
    asked = " and ".join(f"{name}.steps" for name, section in (("mntp", mntp), ("simcse", simcse)) if section.steps)
    if not asked:
        return
    check_decoder(backbone.model.config.model_type, backbone.name, asked)
    if backbone.conventions.attention != "both-ways":
        raise BackboneError(
            f"backbone {backbone.name}: {asked} trains a decoder that attends both ways, but this one is served with "
            "its own direction. Set backbone.attention = 'both-ways'."
        )
    if not backbone.pooling.startswith("mean"):
        raise BackboneError(
            f"backbone {backbone.name}: {asked} trains the mean of all tokens, but it is served with backbone.pooling "
            f"= {backbone.pooling!r}. Set backbone.pooling = 'mean'."
        )
    if mntp.steps:
        language_head(backbone, "mntp.steps")
        mask_token(backbone.tokenizer)
    if simcse.steps and not dropping_layers(backbone.model):
        raise BackboneError(
            f"backbone {backbone.name}: simcse.steps needs a dropout of the attention, which "
            f"{type(backbone.model).__name__} has no setting for. Set simcse.steps = 0, or take another model."
        )


def tokenised(backbone: Backbone, titles: Sequence[str]) -> list[Title]:
    """Return titles between the special tokens and behind the prompt of items."""
    before, suffix = backbone.special.before_item, backbone.special.suffix
    texts = tokenise(backbone.tokenizer, [f"{leading_blank(backbone.tokenizer)}{title}" for title in titles])
    return [
        Title(
            np.concatenate([before, np.array(text, dtype=np.int32), suffix]),
            max(1, len(before)),
            len(before) + len(text),
        )
        for text in texts
    ]


def train_stages(
    backbone: Backbone,
    merged: Adapter,
    titles: Sequence[str],
    settings: StageSettings,
    progress: Callable[[str], None] = lambda line: None,
    checkpoint: Path | None = None,
    keep_every: int = KEPT_EVERY,
) -> tuple[Adapter, Losses]:
    """Train a LoRA over a merge by the stages that are on.

    Args:
        backbone: accepted by :func:`check_stages`; unchanged.
        merged: the merge.
        titles: distinct titles, in an order that depends on nothing but them.
        settings: at least one stage is on.
        progress: receives lines about the progress.
        checkpoint: file of the state after every ``keep_every`` steps, from which a killed training resumes with an
            identical result. The caller removes it once the result is stored.
        keep_every: steps.

    Returns:
        What is to be added to the merge, float32 on the CPU; and the loss of every step.

    Raises:
        MergeError: too few titles, or the loss is not finite.
        LayoutMismatchError: the merge belongs to another backbone.
        ClientError: the checkpoint cannot be written.
    """
    known = tokenised(backbone, titles)
    lora = settings.lora
    losses: Losses = {name: [] for name in settings.names}
    tensors: dict[str, torch.Tensor] = {}
    if checkpoint and (found := read_tensors(checkpoint)):
        tensors = found[0]
        losses |= found[1]["losses"]
    makers = {"mntp": _mntp_steps, "simcse": _simcse_steps}
    with applied(backbone, merged):
        model = attach(backbone, lora.target_modules, lora.rank, lora.scaled_alpha, settings.seed)
        try:
            parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
            with torch.no_grad():
                for number, parameter in enumerate(parameters if tensors else ()):
                    parameter.copy_(tensors[f"parameter.{number}"])
            with using(frozen_products(backbone)):
                for name in settings.names:
                    loss_of = makers[name](backbone, known, settings)
                    _train_stage(name, loss_of, parameters, settings, losses, tensors, progress, checkpoint, keep_every)
            return adapter_of(model), losses
        finally:
            model.unload()


def _train_stage(
    name: str,
    loss_of: Callable[[int], torch.Tensor],
    parameters: Sequence[torch.nn.Parameter],
    settings: StageSettings,
    losses: Losses,
    tensors: Mapping[str, torch.Tensor],
    progress: Callable[[str], None],
    checkpoint: Path | None,
    keep_every: int,
) -> None:
    """Make the steps of one stage that are left, with an optimiser of its own; extend its losses."""
    section: Mntp | Simcse = getattr(settings, name)
    steps, found = section.steps, losses[name]
    warmup = section.warmup_steps if isinstance(section, Simcse) else 0
    optimizer = torch.optim.AdamW(parameters, lr=section.learning_rate, weight_decay=0.0)
    if 0 < len(found) < steps:
        restore(tensors, parameters, optimizer)
        progress(f"{name}: resuming at step {len(found)}")
    for step in range(len(found), steps):
        rate = section.learning_rate * min(1.0, (step + 1) / max(1, warmup)) * (1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss = loss_of(step)
        if not math.isfinite(loss.item()):
            raise MergeError(
                f"{name}: the loss is {loss.item()} at step {step + 1}. Lower {name}.learning_rate "
                f"({section.learning_rate}), or set runtime.precision = 'float32'."
            )
        loss.backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        found.append(loss.item())
        if (step + 1) % max(1, steps // 5) == 0:
            progress(f"{name}: step {step + 1}/{steps}, loss {loss.item():.4f}")
        if checkpoint and (step + 1) % keep_every == 0:
            write_tensors(checkpoint, state_tensors(parameters, optimizer), {"losses": losses}, f"the stage {name}")


def _mntp_steps(backbone: Backbone, titles: Sequence[Title], settings: StageSettings) -> Callable[[int], torch.Tensor]:
    head, mask = language_head(backbone, "mntp.steps"), mask_token(backbone.tokenizer)
    usable = [title for title in titles if title.first < title.end]
    if not usable:
        raise MergeError("mntp: no title has a token behind another one, expected some. Set mntp.steps = 0.")

    def loss_of(step: int) -> torch.Tensor:
        rng = generator(settings.seed, "server", "mntp", step)
        return mntp_loss(backbone, head, _drawn(usable, settings.mntp.batch_size, rng), settings.mntp.share, mask, rng)

    return loss_of


def mntp_loss(
    backbone: Backbone,
    head: LanguageHead,
    titles: Sequence[Title],
    share: float,
    mask: int,
    rng: np.random.Generator,
) -> torch.Tensor:
    """Return the mean loss of the chosen tokens of some titles, differentiable; if none is chosen, draw again.

    Args:
        backbone: a decoder that attends both ways.
        head: its head.
        titles: each with a token that can be predicted.
        share: probability of a token to be chosen.
        mask: token that masks.
        rng: randomness.
    """
    vocabulary = min(len(backbone.tokenizer), len(head.weight))
    number = 0
    while number == 0:
        drawn = [masked(title, share, mask, vocabulary, rng) for title in titles]
        number = sum(len(positions) for _, positions, _ in drawn)
    sequences, positions, tokens = (list(each) for each in zip(*drawn, strict=True))
    return token_losses(backbone, head, sequences, positions, tokens, hide_later=False).sum() / number


def _simcse_steps(
    backbone: Backbone, titles: Sequence[Title], settings: StageSettings
) -> Callable[[int], torch.Tensor]:
    if len(titles) < 2:
        raise MergeError(
            f"simcse: found {len(titles)} title in the catalogs, expected two or more. Set simcse.steps = 0."
        )

    def loss_of(step: int) -> torch.Tensor:
        rng = generator(settings.seed, "server", "simcse", step)
        batch = _drawn(titles, settings.simcse.batch_size, rng)
        with torch_seeded(int(rng.integers(2**31)), backbone.device):
            return simcse_loss(backbone, batch, settings.simcse.dropout, settings.simcse.temperature)

    return loss_of


def simcse_loss(backbone: Backbone, titles: Sequence[Title], dropout: float, temperature: float) -> torch.Tensor:
    """Return the contrast of two passes of B titles under attention dropout, a scalar; the dropout draws from PyTorch.

    Args:
        backbone: a decoder that attends both ways.
        titles: B distinct titles.
        dropout: share of the attention's weights that is dropped.
        temperature: τ.
    """
    sequences = [title.tokens for title in titles]
    with attention_dropout(backbone.model, dropout):
        first, second = (embed_in_groups(backbone, sequences) for _ in range(2))  # (B, d), of length 1
    return contrast(first, second, temperature)


def contrast(first: torch.Tensor, second: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return −(1/B) Σ_i log softmax_j(a_i · b_j / τ)[i] of views (B, d) of length 1."""
    logits = first @ second.T / temperature
    return torch.nn.functional.cross_entropy(logits, torch.arange(len(first), device=logits.device))


@contextmanager
def torch_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block PyTorch draws from this seed; afterwards it goes on as before."""
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type="cuda" if device.type == "cpu" else device.type):
        torch.manual_seed(seed)
        yield


def _drawn(titles: Sequence[Title], number: int, rng: np.random.Generator) -> list[Title]:
    chosen = rng.choice(len(titles), min(number, len(titles)), replace=False)
    return [titles[index] for index in np.sort(chosen)]
