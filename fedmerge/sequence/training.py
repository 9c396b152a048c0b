"""Training of a sequence model: next items of one client's users, softmax over all or drawn items, early stopping."""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from fedmerge.device import Compute
from fedmerge.domain.splits import Examples
from fedmerge.errors import ClientError, DomainError
from fedmerge.evaluation.ranks import (
    IntArray,
    check_in_catalog,
    rank_targets,
    selection_score,
)
from fedmerge.seeding import derive, generator
from fedmerge.sequence.blocks import LOGITS_PER_BLOCK, MIN_SEQUENCE, backward_in_blocks
from fedmerge.sequence.catalog import DrawnItems, draw_items
from fedmerge.sequence.checkpoint import Progressed, Tensors, read_checkpoint, write_checkpoint
from fedmerge.sequence.contrast import Contrast, contrast_backward
from fedmerge.sequence.model import SequenceModel, SequenceSettings
from fedmerge.sequence.ranking import pad, sequence_source

BATCHES_PER_BUCKET = 16  # batches of randomly drawn users among which users of similar length are grouped

Optimizers = dict[str, torch.optim.Optimizer]
"""Group of the checkpoint -> optimiser."""
Progress = Callable[[str], None]


@dataclass(frozen=True)
class SequenceReport:
    """Report of a training.

    Attributes:
        epochs: epochs made.
        best_epoch: the selected epoch, from 1; 0 is the untrained model.
        stopped_by: ``max_epochs``, ``max_minutes`` or ``patience``.
        seconds: wall clock.
        losses: mean training loss of every epoch.
        validation_ndcgs: NDCG@10 before training and after every epoch.
    """

    epochs: int
    best_epoch: int
    stopped_by: str
    seconds: float
    losses: tuple[float, ...]
    validation_ndcgs: tuple[float, ...]


def train_sequence_model(
    sequences: Sequence[IntArray],
    num_items: int,
    validation: Examples,
    settings: SequenceSettings,
    seed: int,
    compute: Compute,
    item_vectors: torch.Tensor | None = None,
    progress: Progress = lambda line: None,
    checkpoint: Path | None = None,
    contrast: Contrast | None = None,
) -> tuple[SequenceModel, SequenceReport]:
    """Train on next items and select the epoch that ranks the validation users best (NDCG@10, unmasked).

    loss = mean over users and positions of -log softmax_j <h_s, r_j>[item s + 1], over all items j of the catalog, plus
    the weighted contrast of two views of each user's history, if there is one

    With ``sampled_items`` the softmax of a step is over items drawn for it, see :class:`DrawnItems`, and the step costs
    the same in a catalog of any size. Validation ranks all items.

    Args:
        sequences: train sequences, oldest first; the last ``max_length + 1`` items of each are used, and sequences of
            fewer than two items are left out.
        num_items: N.
        validation: examples of the split ``valid``.
        settings: inputs and size; training ends at the first limit reached.
        seed: seed of weights, order and dropout. With one device, thread count and version the same seed gives the same
            model, unless ``max_minutes`` ends the training.
        compute: device, and the precision of the item MLP and of the gradients over all items; the softmax is float32.
        item_vectors: (N, d) text vectors, L2-normalised; None with ``inputs = "ids"``.
        progress: receives one line after every epoch.
        checkpoint: file for the state after every epoch; a training that finds one resumes from it. The caller names
            it by everything that the training depends on, and deletes it.
        contrast: weight and augmentations of the contrast of views; None: without.

    Returns:
        The model in evaluation mode, and the report of its training.

    Raises:
        DomainError: no sequence to train on.
        LayoutMismatchError: an item index outside the catalog, or text vectors that do not fit it.
        ClientError: the loss is not finite, or the checkpoint cannot be written.

    Source: the loss over the whole catalog as in Klenitskiy and Vasilev, Turning dross into gold loss, RecSys 2023.
    Differs: the SASRec paper scores one sampled negative per position by binary cross-entropy, which makes SASRec much
        weaker. With sampled items, ids have an Adam without dense moments (PyTorch's SparseAdam): what a step neither
        reads nor scores keeps its embedding and moments.
    """
    cut = [np.asarray(s[-settings.max_length - 1 :], dtype=np.int64) for s in sequences if len(s) >= MIN_SEQUENCE]
    if not cut:
        raise DomainError(
            f"a sequence model cannot be trained: none of {len(sequences)} train sequences has {MIN_SEQUENCE} items or "
            "more. Add data, or leave the model out: evaluation.baselines without sasrec, head.kind = 'none'."
        )
    trained_items = np.unique(np.concatenate(cut))
    check_in_catalog(trained_items, num_items, "the train sequences")
    lengths = np.array([len(sequence) for sequence in cut])
    started = time.monotonic()
    with torch.random.fork_rng([compute.device] if compute.device.type == "cuda" else []):
        torch.manual_seed(derive(seed, "sasrec"))  # the purposes keep the name that they have in published results
        model = SequenceModel(num_items, settings, item_vectors)
        if settings.inputs == "text+ids":
            model.trained_items.zero_()[torch.from_numpy(trained_items)] = True
        model = model.to(compute.device)
        optimizers = optimizers_of(model)
        losses, stopped_by = list[float](), ""
        resumed = None if checkpoint is None else read_checkpoint(checkpoint)
        if resumed is None:
            ndcgs, best, best_epoch, earlier = [_ndcg(model, validation)], _weights(model), 0, 0.0
        else:
            progressed, groups = resumed
            best, best_epoch, earlier = groups["best"], progressed.best_epoch, progressed.seconds
            losses, ndcgs = list(progressed.losses), list(progressed.ndcgs)
            _restore(model, optimizers, groups)
            progress(f"resuming after epoch {len(losses)}")
            stopped_by = _limit(settings, len(losses), best_epoch)
        end = started - earlier + 60 * (settings.max_minutes or math.inf)
        while not stopped_by:
            batches = _batches(lengths, settings.batch_size, generator(seed, "sasrec", len(losses)))
            of_users = ([cut[user] for user in batch] for batch in batches)
            views = None if contrast is None else (contrast, generator(seed, "sasrec", "views", len(losses)))
            drawing = generator(seed, "sasrec", "items", len(losses))
            loss, finished = _epoch(model.train(), optimizers, of_users, end, compute.autocast_dtype, views, drawing)
            if not math.isfinite(loss):
                raise ClientError(
                    f"the training loss of a sequence model is {loss} in epoch {len(losses) + 1}. Leave the model out: "
                    "evaluation.baselines without sasrec, head.kind = 'none'."
                )
            losses.append(loss)
            ndcgs.append(_ndcg(model, validation))
            if ndcgs[-1] > max(ndcgs[:-1]):
                best, best_epoch = _weights(model), len(losses)
            stopped_by = _limit(settings, len(losses), best_epoch) if finished else "max_minutes"
            seconds = earlier + time.monotonic() - started
            if checkpoint is not None and not stopped_by:
                figures = Progressed(seconds, best_epoch, tuple(losses), tuple(ndcgs))
                write_checkpoint(checkpoint, figures, {"best": best, **_state(model, optimizers)})
            progress(
                f"epoch {len(losses)}, {seconds / 60:.1f} min, loss {losses[-1]:.3f}, validation ndcg@10 "
                f"{ndcgs[-1]:.4f} (best {max(ndcgs):.4f}){f', stopped by {stopped_by}' if stopped_by else ''}"
            )
    model.load_state_dict(best)
    seconds = earlier + time.monotonic() - started
    return model.eval(), SequenceReport(len(losses), best_epoch, stopped_by, seconds, tuple(losses), tuple(ndcgs))


def backward(
    model: SequenceModel,
    batch: Sequence[npt.NDArray[np.int64]],
    dtype: torch.dtype | None = None,
    *,
    logits_per_block: int = LOGITS_PER_BLOCK,
    drawn: DrawnItems | None = None,
) -> float:
    """Add the gradients of a batch's mean loss to the model's.

    Representations are computed once for the batch: the blocks add their gradients to a copy, which then passes through
    the model in one go.

    Args:
        model: in training mode.
        batch: sequences of two items or more; every item except the first is predicted from those before it.
        dtype: of the products over all items that the loss itself does not need exactly; None for float32 throughout.
        logits_per_block: logits held at once, for a block of positions; it changes the gradients by rounding only.
        drawn: items that the softmax is over, those of the batch among them; None: the catalog.

    Returns:
        The loss.
    """
    device, of_catalog = model.positions.weight.device, None
    if drawn is not None:
        batch, of_catalog = drawn.numbered(batch), drawn.items
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        base = model.base(of_catalog).float()
    items = model.item_representations(base, of_catalog)  # (N, h), or those of the drawn items
    padded, lengths = pad([sequence[:-1] for sequence in batch], device)
    hidden = model(padded, base, of_catalog)[torch.arange(padded.shape[1], device=device) < lengths[:, None]]  # (P, h)
    targets = torch.from_numpy(np.concatenate([sequence[1:] for sequence in batch])).to(device)  # (P,)
    states, catalog = hidden.detach().requires_grad_(), items.detach().requires_grad_()
    total = backward_in_blocks(states, catalog, targets, dtype=dtype, logits_per_block=logits_per_block, drawn=drawn)
    torch.autograd.backward([hidden, items], [states.grad, catalog.grad])
    return total


def _epoch(
    model: SequenceModel,
    optimizers: Optimizers,
    batches: Iterable[Sequence[npt.NDArray[np.int64]]],
    end: float,
    dtype: torch.dtype | None,
    views: tuple[Contrast, np.random.Generator] | None,
    drawing: np.random.Generator,
) -> tuple[float, bool]:
    """Make one pass over the users, up to a time of the monotonic clock.

    Returns:
        The mean loss, which ends the pass if it is not finite; and False if the time was up.
    """
    total = num_predicted = 0.0
    number, device = model.settings.sampled_items, model.positions.weight.device
    for batch in batches:
        for optimizer in optimizers.values():
            optimizer.zero_grad()
        drawn = None if number is None else draw_items(batch, number, model.num_items, drawing, device)
        loss = backward(model, batch, dtype, drawn=drawn)
        if views is not None:
            loss += contrast_backward(model, batch, *views, dtype)
        if not math.isfinite(loss):
            return loss, True
        for optimizer in optimizers.values():
            optimizer.step()
        count = float(sum(len(sequence) - 1 for sequence in batch))
        total, num_predicted = total + loss * count, num_predicted + count
        if time.monotonic() >= end:
            return total / num_predicted, False
    return total / num_predicted, True


def optimizers_of(model: SequenceModel) -> Optimizers:
    """Return Adam of all weights; with sampled items, ids have one of their own, for the items of a step alone."""
    rate = model.settings.learning_rate
    if model.settings.sampled_items is None or model.settings.inputs == "text":
        return {"optimizer": torch.optim.Adam(model.parameters(), lr=rate)}
    model.items.sparse = True
    others = [parameter for name, parameter in model.named_parameters() if name != "items.weight"]
    of_ids = torch.optim.SparseAdam([model.items.weight], lr=rate)
    return {"optimizer": torch.optim.Adam(others, lr=rate), "optimizer of ids": of_ids}


def _limit(settings: SequenceSettings, epochs: int, best_epoch: int) -> str:
    """Return the limit that a training has reached, or nothing."""
    if epochs > best_epoch and epochs - best_epoch >= settings.patience:
        return "patience"
    return "max_epochs" if epochs >= settings.max_epochs else ""


def _batches(
    lengths: npt.NDArray[np.int64], batch_size: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.int64]]:
    """Draw one epoch: every user once, in batches of similar length."""
    users = rng.permutation(len(lengths))
    for bucket in np.array_split(users, math.ceil(len(users) / (BATCHES_PER_BUCKET * batch_size))):
        by_length = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches = np.array_split(by_length, math.ceil(len(by_length) / batch_size))
        for index in rng.permutation(len(batches)):
            yield batches[index]


def _ndcg(model: SequenceModel, validation: Examples) -> float:
    source = sequence_source(model.eval(), validation.histories)
    ranks = rank_targets(source.user_vectors, source.item_vectors, validation.targets)
    return selection_score(ranks)


def _weights(model: SequenceModel) -> Tensors:
    """Copy the weights to the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _state(model: SequenceModel, optimizers: Optimizers) -> dict[str, Tensors]:
    """Return what the next epoch depends on: weights, the optimisers' moments, the generator's state."""
    moments = {
        group: {
            f"{number}.{name}": torch.as_tensor(moment).cpu()  # SparseAdam counts its steps by an int
            for number, of_parameter in optimizer.state_dict()["state"].items()
            for name, moment in of_parameter.items()
        }
        for group, optimizer in optimizers.items()
    }
    device = model.positions.weight.device
    drawn = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return {"model": _weights(model), **moments, "generator": {"state": drawn}}


def _restore(model: SequenceModel, optimizers: Optimizers, groups: dict[str, Tensors]) -> None:
    """Load a state of :func:`_state`, in place."""
    model.load_state_dict(groups["model"])
    for group, optimizer in optimizers.items():
        state = optimizer.state_dict()
        for key, moment in groups[group].items():
            number, name = key.split(".", 1)
            of_parameter = state["state"].setdefault(int(number), {})
            of_parameter[name] = moment if moment.is_floating_point() else moment.item()
        optimizer.load_state_dict(state)
    device, drawn = model.positions.weight.device, groups["generator"]["state"]
    if device.type == "cuda":
        torch.cuda.set_rng_state(drawn, device)
    else:
        torch.set_rng_state(drawn)
