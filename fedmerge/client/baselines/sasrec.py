"""SASRec: a causal Transformer over item ids, trained by one client on its own users alone."""

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from fedmerge import __version__
from fedmerge.client.cache.folders import fill_folder, inputs_key
from fedmerge.client.local_domain import LocalDomain
from fedmerge.domain.splits import Examples, evaluation_examples
from fedmerge.encoder.encode import length_batches
from fedmerge.errors import ClientError, DomainError
from fedmerge.evaluation.ranks import METRICS, IntArray, check_in_catalog, per_user_metrics, rank_targets
from fedmerge.seeding import derive, generator

TENSOR_FILE = "model.safetensors"
REPORT_FILE = "training.json"
MIN_SEQUENCE = 2  # one item to read and one to predict
BATCHES_PER_BUCKET = 16  # batches of randomly drawn users among which users of similar length are grouped
LOGITS_PER_BLOCK = 2**20  # 4 MiB of float32: larger blocks do not fit a CPU's cache and are a third slower
POSITIONS_PER_BATCH = 16384  # padded positions encoded at once outside training
INITIAL_STD = 0.02

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Settings:
    """Size and training of the model, selected on validation users of Beauty (docs/results.md).

    Attributes:
        hidden_size: size d of an item vector, a multiple of ``heads``.
        layers: number of Transformer blocks.
        heads: attention heads per block.
        dropout: share of values dropped in training.
        max_length: number of most recent items read of a history.
        learning_rate: Adam learning rate.
        batch_size: users per step.
        max_epochs: largest number of passes over the users.
        max_minutes: wall-clock limit or None; if it ends the training, the row depends on the machine's speed.
        validation_users: validation users for early stopping after every epoch; None: all.
        patience: epochs without a better NDCG@10 before training stops.
    """

    hidden_size: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.5
    max_length: int = 50
    learning_rate: float = 1e-3
    batch_size: int = 64
    max_epochs: int = 100
    max_minutes: float | None = None
    validation_users: int | None = None
    patience: int = 5


class SASRec(nn.Module):
    """Causal Transformer over histories; an item's score is the inner product of hidden state and item embedding.

    Source: Kang and McAuley, Self-attentive sequential recommendation, ICDM 2018.
    Differs: layer normalisation before attention also on keys and values, as in later Transformers; histories are
        padded on the right and positions count from the oldest item that is read, so that padding needs no mask besides
        the causal one.
    """

    def __init__(self, num_items: int, settings: Settings) -> None:
        """Draw fresh weights from PyTorch's global generator.

        Args:
            num_items: N.
            settings: widths, depth and dropout.
        """
        super().__init__()
        width = settings.hidden_size
        self.items = nn.Embedding(num_items, width)  # (N, d), also the output layer
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

    def forward(self, histories: torch.Tensor) -> torch.Tensor:
        """Return the hidden states after each item.

        Args:
            histories: (b, t) int64 item indices, oldest first, padded on the right with any item; t at most max_length.

        Returns:
            (b, t, d); position s has read items 0 .. s and nothing later.
        """
        length = histories.shape[1]
        hidden = self.items(histories) * math.sqrt(self.items.embedding_dim) + self.positions.weight[:length]
        causal = nn.Transformer.generate_square_subsequent_mask(length, device=histories.device)  # (t, t)
        encoded: torch.Tensor = self.blocks(self.dropout(hidden), mask=causal, is_causal=True)
        return encoded


@dataclass(frozen=True)
class SASRecReport:
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


def train_sasrec(
    sequences: Sequence[IntArray],
    num_items: int,
    validation: Examples,
    settings: Settings,
    seed: int,
    device: torch.device,
    progress: Progress = lambda line: None,
) -> tuple[SASRec, SASRecReport]:
    """Train on next items and select the epoch that ranks the validation users best (NDCG@10, unmasked).

    loss = mean over users and positions of -log softmax_j <h_s, e_j>[item s + 1], over all items j of the catalog

    Args:
        sequences: train sequences, oldest first; the last ``max_length + 1`` items of each are used, and sequences of
            fewer than two items are left out.
        num_items: N.
        validation: examples of the split ``valid``.
        settings: training ends at the first limit reached.
        seed: seed of weights, order and dropout. With one device, thread count and version the same seed gives the same
            model, unless ``max_minutes`` ends the training.
        device: device of the training.
        progress: receives one line after every epoch.

    Returns:
        The model in evaluation mode, and the report of its training.

    Raises:
        DomainError: no sequence to train on.
        LayoutMismatchError: an item index outside the catalog.
        ClientError: the loss is not finite.

    Source: the loss over the whole catalog as in Klenitskiy and Vasilev, Turning dross into gold loss, RecSys 2023.
    Differs: the SASRec paper scores one sampled negative per position by binary cross-entropy, which makes SASRec much
        weaker.
    """
    cut = [np.asarray(s[-settings.max_length - 1 :], dtype=np.int64) for s in sequences if len(s) >= MIN_SEQUENCE]
    if not cut:
        raise DomainError(
            f"SASRec: none of {len(sequences)} train sequences has {MIN_SEQUENCE} items or more. Remove sasrec from "
            "evaluation.baselines for this domain, or add data."
        )
    check_in_catalog(np.concatenate(cut), num_items, "the train sequences")
    lengths = np.array([len(sequence) for sequence in cut])
    started = time.monotonic()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(derive(seed, "sasrec"))
        model = SASRec(num_items, settings).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
        ndcgs, losses, stopped_by = [_ndcg(model, validation)], list[float](), ""
        best, best_epoch = _weights(model), 0
        while not stopped_by:
            model.train()
            total = num_predicted = 0.0
            for batch in _batches(lengths, settings.batch_size, generator(seed, "sasrec", len(losses))):
                optimizer.zero_grad()
                loss = backward(model, [cut[user] for user in batch])
                if not math.isfinite(loss):
                    raise ClientError(
                        f"SASRec: the training loss is {loss} in epoch {len(losses) + 1}. "
                        "Remove sasrec from evaluation.baselines."
                    )
                optimizer.step()
                count = float(lengths[batch].sum() - len(batch))
                total, num_predicted = total + loss * count, num_predicted + count
                if _minutes(started) >= (settings.max_minutes or math.inf):
                    stopped_by = "max_minutes"
                    break
            losses.append(total / num_predicted)
            ndcgs.append(_ndcg(model, validation))
            if ndcgs[-1] > max(ndcgs[:-1]):
                best, best_epoch = _weights(model), len(losses)
            elif len(losses) - best_epoch >= settings.patience:
                stopped_by = stopped_by or "patience"
            if len(losses) >= settings.max_epochs:
                stopped_by = stopped_by or "max_epochs"
            progress(
                f"sasrec epoch {len(losses)}, {_minutes(started):.1f} min, loss {losses[-1]:.3f}, validation ndcg@10 "
                f"{ndcgs[-1]:.4f} (best {max(ndcgs):.4f}){f', stopped by {stopped_by}' if stopped_by else ''}"
            )
    model.load_state_dict(best)
    seconds = time.monotonic() - started
    return model.eval(), SASRecReport(len(losses), best_epoch, stopped_by, seconds, tuple(losses), tuple(ndcgs))


def sasrec_ranks(
    model: SASRec, histories: Sequence[IntArray], targets: IntArray, seen: Sequence[IntArray] | None = None
) -> npt.NDArray[np.int64]:
    """Rank the targets by the inner product with the hidden state after the last item of the history.

    Args:
        model: in evaluation mode.
        histories: one array of item indices per user, oldest first, none empty; the most recent ``max_length`` items
            are read.
        targets: (U,) item indices.
        seen: as in :func:`fedmerge.evaluation.ranks.target_ranks`; None is the unmasked variant.

    Returns:
        (U,) int64 ranks from 1.
    """
    return rank_targets(user_vectors(model, histories), model.items.weight.detach().cpu(), targets, seen)


@torch.no_grad()
def user_vectors(model: SASRec, histories: Sequence[IntArray]) -> torch.Tensor:
    """Return the hidden states after the last item of each history.

    Returns:
        float32 (U, d) on the CPU.
    """
    cut = [np.asarray(history[-model.positions.num_embeddings :], dtype=np.int64) for history in histories]
    vectors = torch.empty(len(cut), model.items.embedding_dim)
    for batch in length_batches([len(history) for history in cut], POSITIONS_PER_BATCH):
        padded, lengths = _padded([cut[user] for user in batch], model.items.weight.device)
        hidden = model(padded)
        vectors[torch.from_numpy(batch)] = hidden[torch.arange(len(batch)), lengths - 1].cpu()
    return vectors


def load_or_train_sasrec(
    domain: LocalDomain, settings: Settings, seed: int, cache_dir: Path, progress: Progress
) -> SASRec:
    """Return the domain's SASRec: from the cache if the same inputs were trained before, else trained and cached.

    Args:
        domain: the client's domain.
        settings: size and training.
        seed: seed of weights, order and dropout. Data, device, threads and versions are part of the cache's key, too.
        cache_dir: folder on the client's own disk.
        progress: receives one line now and then.

    Raises:
        DomainError: as :func:`train_sasrec`.
        ClientError: as :func:`train_sasrec`, or the model cannot be cached.
    """
    name, num_items, device = domain.manifest.name, len(domain.catalog), domain.backbone.device
    inputs = {
        "interactions": domain.manifest.interactions_sha256,
        "num_items": num_items,
        "sasrec": asdict(settings),
        "seed": seed,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "versions": [__version__, torch.__version__],
    }
    folder = cache_dir / "sasrec" / f"{name}-{inputs_key(inputs)}"
    if cached := _read_cached(folder):
        progress(f"{name}: reusing the cached sasrec in {folder}")
        model = SASRec(num_items, settings).to(device)
        model.load_state_dict(cached)
        return model.eval()
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one
    validation = evaluation_examples(domain.interactions, "valid", settings.validation_users, seed)
    model, report = train_sasrec(
        domain.training_sequences,
        num_items,
        validation,
        settings,
        seed,
        device,
        lambda line: progress(f"{name}: {line}"),
    )
    tensors = save(_weights(model))

    def write(partial: Path) -> None:
        (partial / TENSOR_FILE).write_bytes(tensors)
        record: dict[str, Any] = {**asdict(report), "sha256": hashlib.sha256(tensors).hexdigest()}
        (partial / REPORT_FILE).write_text(json.dumps(record, indent=2) + "\n")

    fill_folder(folder, write, lambda: _read_cached(folder) is not None, f"domain {name}: its sasrec")
    return model


def _read_cached(folder: Path) -> dict[str, torch.Tensor] | None:
    """Read the cached weights; None if they are missing or damaged."""
    try:
        tensors, report = (folder / TENSOR_FILE).read_bytes(), json.loads((folder / REPORT_FILE).read_text())
        return load(tensors) if hashlib.sha256(tensors).hexdigest() == report["sha256"] else None
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def backward(
    model: SASRec, batch: Sequence[npt.NDArray[np.int64]], *, logits_per_block: int = LOGITS_PER_BLOCK
) -> float:
    """Add the gradients of a batch's mean loss to the model's.

    Args:
        model: in training mode.
        batch: sequences of two items or more; every item except the first is predicted from those before it.
        logits_per_block: logits held at once, for a block of positions; it changes the gradients by rounding only.

    Returns:
        The loss.
    """
    device = model.items.weight.device
    padded, lengths = _padded([sequence[:-1] for sequence in batch], device)
    hidden = model(padded)[torch.arange(padded.shape[1], device=device) < lengths[:, None]]  # (P, d)
    targets = torch.from_numpy(np.concatenate([sequence[1:] for sequence in batch])).to(device)  # (P,)
    leaf = hidden.detach().requires_grad_()
    total = 0.0
    size = max(1, logits_per_block // len(model.items.weight))
    for some, their_targets in zip(torch.split(leaf, size), torch.split(targets, size), strict=True):
        logits = some @ model.items.weight.T  # (block, N)
        loss = nn.functional.cross_entropy(logits, their_targets, reduction="sum") / len(targets)
        loss.backward()  # type: ignore[no-untyped-call]  # PyTorch leaves it untyped
        total += loss.item()
    hidden.backward(leaf.grad)
    return total


def _padded(sequences: Sequence[npt.NDArray[np.int64]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return items (b, longest), padded on the right with item 0, which is never read, and lengths (b,)."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = np.zeros((len(sequences), int(lengths.max())), dtype=np.int64)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = sequence
    return torch.from_numpy(padded).to(device), lengths.to(device)


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


def _ndcg(model: SASRec, validation: Examples) -> float:
    ranks = sasrec_ranks(model.eval(), validation.histories, validation.targets)
    return float(per_user_metrics(ranks)[:, METRICS.index("ndcg@10")].mean())


def _weights(model: SASRec) -> dict[str, torch.Tensor]:
    """Copy the weights to the CPU."""
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _minutes(started: float) -> float:
    return (time.monotonic() - started) / 60
