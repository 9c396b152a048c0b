"""Encode token sequences into vectors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import chain, pairwise
from threading import RLock

import numpy as np
import torch
from peft.helpers import disable_input_dtype_casting
from torch.utils.checkpoint import checkpoint

from fedmerge.encoder.attention import attends_globally
from fedmerge.encoder.backbone import Backbone
from fedmerge.encoder.fast.fused import fused_encoder
from fedmerge.encoder.fast.varlen import VARLEN, on_device, padded_again, takes_varlen, varlen_inputs
from fedmerge.encoder.text import PADDING, Tokens

TOKENS_PER_BATCH = 4096  # larger batches are not faster on a CPU: they exceed its caches
GPU_TOKENS_PER_BATCH = 32_768  # so that it computes for longer than its kernels take to start
EAGER_ATTENTION_TOKENS = 256
TRAINING_GROUPS = 4  # parts of a training batch on a CPU, each padded to its own longest sequence
Encode = Callable[[Sequence[Tokens]], torch.Tensor]
_switching = RLock()  # held while a model has another attention than its own
_tokens_at_once: ContextVar[int | None] = ContextVar("tokens_at_once", default=None)


def embed_batch(backbone: Backbone, sequences: Sequence[Tokens], *, varlen: bool | None = None) -> torch.Tensor:
    """Encode one batch, differentiably.

    Args:
        backbone: the encoder.
        sequences: n token sequences, special tokens included.
        varlen: False: layers get a row for each sequence; None: see :func:`takes_varlen`.

    Returns:
        float32 (n, d), L2-normalised rows; d is ``backbone.dimension`` if that is set.
    """
    hidden, mask = hidden_states(backbone, sequences, varlen=varlen)
    if backbone.pooling == "mean-text":
        mask = _text_mask(backbone, sequences, mask)
    return vectors_of(hidden, mask, backbone.pooling, backbone.width)


def embed_in_groups(backbone: Backbone, sequences: Sequence[Tokens]) -> torch.Tensor:
    """Encode one batch as :func:`embed_batch` does, in groups of similar length.

    On a CPU they save padding. Within :func:`tokens_at_once` they limit memory, on every device.
    """
    return in_groups(backbone, sequences, lambda group: embed_batch(backbone, [sequences[i] for i in group]))


def token_states_in_groups(backbone: Backbone, sequences: Sequence[Tokens], positions: Sequence[int]) -> torch.Tensor:
    """Return the hidden state of one token of each sequence, float32 (n, d), differentiably and not normalised.

    Args:
        backbone: the encoder.
        sequences: n token sequences, special tokens included.
        positions: (n,) index of the token in its sequence.
    """

    def states(group: Sequence[int]) -> torch.Tensor:
        hidden, _ = hidden_states(backbone, [sequences[i] for i in group])
        rows = torch.arange(len(group), device=hidden.device)
        return hidden[rows, torch.tensor([positions[i] for i in group], device=hidden.device)][:, : backbone.width]

    return in_groups(backbone, sequences, states)


def hidden_states(
    backbone: Backbone, sequences: Sequence[Tokens], *, varlen: bool | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token vectors of a batch, float32 (n, longest, d), and which of them are none of padding.

    Args:
        backbone: the encoder.
        sequences: n token sequences, special tokens included.
        varlen: whether the model reads them end to end; None: see :func:`takes_varlen`.
    """
    lengths = [len(sequence) for sequence in sequences]
    device, dtype = backbone.device, backbone.compute.autocast_dtype
    mask = torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]  # (n, longest)
    varlen = takes_varlen(backbone) if varlen is None else varlen
    inputs = varlen_inputs(backbone, sequences) if varlen else _inputs(backbone, sequences, mask.to(device))
    with (
        _attention(backbone, max(lengths), varlen=varlen),
        disable_input_dtype_casting(
            backbone.model, active=dtype is not None
        ),  # otherwise PEFT casts to float32 and back
        torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        hidden = backbone.model(**inputs).last_hidden_state  # (n, longest, d) or (1, t, d)
    if varlen:
        hidden = padded_again(hidden[0], lengths)
    return hidden.float(), mask.to(device)


def _padding(backbone: Backbone) -> int | list[int]:
    """Return the token that pads a batch, with type and item position if the backbone's tokens have them."""
    if backbone.special.attributes is None:
        return backbone.special.pad
    return [backbone.special.pad, PADDING, int(backbone.model.config.max_item_embeddings) - 1]


def _inputs(backbone: Backbone, sequences: Sequence[Tokens], mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the model's arguments for sequences that are padded to the shape (n, longest) of their mask."""
    columns = sequences[0].shape[1:]  # () or (3,)
    padded = np.full((*mask.shape, *columns), _padding(backbone), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = sequence
    tokens = on_device(padded, mask.device)
    inputs = {"input_ids": tokens, "attention_mask": mask}
    if tokens.ndim == 3:
        names = ("input_ids", "token_type_ids", "item_position_ids")
        inputs |= dict(zip(names, tokens.unbind(dim=2), strict=True))
    if attends_globally(backbone.model):
        first = torch.zeros_like(mask, dtype=torch.long)
        first[:, 0] = 1
        inputs |= {"attention_mask": mask.long(), "global_attention_mask": first}
    return inputs


def _text_mask(backbone: Backbone, sequences: Sequence[Tokens], mask: torch.Tensor) -> torch.Tensor:
    """Leave the special tokens and the prompt before every text out of a mask (n, tokens), unless nothing is left."""
    special = backbone.special
    starts = sorted((special.before_history, special.before_item), key=len, reverse=True)
    kept = mask.clone()
    for row, sequence in enumerate(sequences):
        before = next((len(start) for start in starts if np.array_equal(sequence[: len(start)], start)), 0)
        if before + len(special.suffix) < len(sequence):
            kept[row, :before] = False
    return kept


def in_groups(
    backbone: Backbone, sequences: Sequence[Tokens], vectors_of: Callable[[Sequence[int]], torch.Tensor]
) -> torch.Tensor:
    """Return the vectors (n, d), or the numbers (n,), of all sequences; ``vectors_of`` makes those of a group."""
    again = _tokens_at_once.get() is not None
    if backbone.device.type != "cpu" and not again:
        return vectors_of(range(len(sequences)))
    groups = training_groups(sequences)
    parts = [
        checkpoint(vectors_of, group.tolist(), use_reentrant=False, preserve_rng_state=False)
        if again
        else vectors_of(group.tolist())
        for group in groups
    ]
    places = torch.from_numpy(np.argsort(np.concatenate(groups)))
    return torch.cat(parts)[places.to(parts[0].device)]


def training_groups(sequences: Sequence[Tokens]) -> list[np.ndarray]:
    """Split a training batch into groups of similar length, TRAINING_GROUPS or as :func:`tokens_at_once` says."""
    lengths = [len(sequence) for sequence in sequences]
    if limit := _tokens_at_once.get():
        return length_batches(lengths, limit)
    order = np.argsort(lengths, kind="stable")
    return [group for group in np.array_split(order, TRAINING_GROUPS) if len(group)]


@contextmanager
def tokens_at_once(number: int | None) -> Iterator[None]:
    """Within the block, keep no activations of groups, which have this many padded tokens at most, or one sequence.

    Each group is encoded again when its gradient is computed, so the memory of a batch no longer depends on its size.
    The vectors are those of whole batches apart from rounding. None: nothing is encoded again.

    Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, RepL4NLP 2021.
    """
    before = _tokens_at_once.set(number)
    try:
        yield
    finally:
        _tokens_at_once.reset(before)


def encode(
    backbone: Backbone, sequences: Sequence[Tokens], progress: Callable[[int, int], None] | None = None
) -> torch.Tensor:
    """Encode many sequences in batches of similar length.

    Args:
        backbone: the encoder.
        sequences: n token sequences.
        progress: called with (done, total) after every batch.

    Returns:
        float32 (n, d) on the CPU, in the given order. Apart from rounding, a row does not depend on the others.
        Batches are formed by length, ties in the given order.
    """
    return _encode(backbone, _embedding(backbone), sequences, progress)


def prepared(backbone: Backbone) -> Encode:
    """Return :func:`encode` of a backbone whose weights do not change any more, for many calls on any thread.

    What :func:`encode` computes of the weights in every call, such as their packed bfloat16, is computed once here.
    """
    embed = _embedding(backbone)
    return lambda sequences: _encode(backbone, embed, sequences, None)


def _embedding(backbone: Backbone) -> Encode:
    return fused_encoder(backbone) or partial(embed_batch, backbone)


@torch.no_grad()
def _encode(
    backbone: Backbone, embed: Encode, sequences: Sequence[Tokens], progress: Callable[[int, int], None] | None
) -> torch.Tensor:
    vectors = torch.empty(len(sequences), backbone.width)
    at_once = TOKENS_PER_BATCH if backbone.device.type == "cpu" else GPU_TOKENS_PER_BATCH
    batches = length_batches([len(sequence) for sequence in sequences], at_once)
    computed = (embed([sequences[i] for i in batch]) for batch in batches)
    done = 0
    one_ahead = pairwise(chain(computed, [torch.empty(0)]))  # a GPU has the next batch when a batch is copied
    for batch, (found, _) in zip(batches, one_ahead, strict=True):
        vectors[torch.from_numpy(batch)] = found.cpu()
        done += len(batch)
        if progress is not None:
            progress(done, len(sequences))
    return vectors


def length_batches(lengths: Sequence[int], tokens_per_batch: int) -> list[np.ndarray]:
    """Split sequences, longest first, into batches of indices with at most ``tokens_per_batch`` padded tokens."""
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    batches, start = [], 0
    while start < len(order):
        size = max(1, tokens_per_batch // max(1, lengths[order[start]]))
        batches.append(order[start : start + size])
        start += size
    return batches


def vectors_of(hidden: torch.Tensor, mask: torch.Tensor, pooling: str, width: int) -> torch.Tensor:
    """Pool token vectors as :func:`pool` does, keep the first ``width`` dimensions, and normalise: (n, width)."""
    return torch.nn.functional.normalize(pool(hidden, mask, pooling)[:, :width], dim=-1)


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pool token vectors (n, tokens, d) to (n, d).

    Args:
        hidden: token vectors, padded on the right.
        mask: (n, tokens), false or 0 where a sequence is padded.
        pooling: ``cls``, ``last``, or a mean over what the mask has.
    """
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(hidden.shape[0], device=hidden.device), mask.sum(dim=1) - 1]
    kept = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * kept).sum(dim=1) / kept.sum(dim=1)


@contextmanager
def _attention(backbone: Backbone, tokens: int, *, varlen: bool) -> Iterator[None]:
    """Use the attention over variable lengths if asked, plain attention for gradients of short sequences on a CPU.

    Otherwise the model's own is used. On a CPU the backward pass of PyTorch's fused attention takes most of a training
    step. For long sequences plain attention is slower: its memory grows with their square. Threads that switch the
    attention of a model take turns.
    """
    model = backbone.model
    plain = torch.is_grad_enabled() and backbone.device.type == "cpu" and tokens <= EAGER_ATTENTION_TOKENS
    if not varlen and not plain:
        yield
        return
    with _switching:
        own = model.config._attn_implementation  # transformers has a public setter, but no getter
        model.set_attn_implementation(VARLEN if varlen else "eager")
        try:
            yield
        finally:
            model.set_attn_implementation(own)
