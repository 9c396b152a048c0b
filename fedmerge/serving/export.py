"""Export what a run serves a domain as a folder that needs no fedmerge: the encoder, and its head if there is one."""

import hashlib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from fedmerge.adapter import Adapter, adapter_sha256
from fedmerge.client.heads.heads import LocalHead, source_names
from fedmerge.encoder.export.card import encode_recipe
from fedmerge.encoder.export.folder import export_model, provenance_of
from fedmerge.encoder.export.formats import Format, check_format
from fedmerge.encoder.export.probes import Deviation
from fedmerge.encoder.text import item_text
from fedmerge.evaluation.sums import (
    BACKBONE,
    EXPERT,
    FEDERATED_FUSED,
    FEDERATED_HEAD,
    FEDERATED_SOURCES,
    GROUP,
    PERSONAL,
    WOVEN,
)
from fedmerge.files import check_free, write_bytes, write_json
from fedmerge.report.run.model_card import label_of, sections_of_run
from fedmerge.runs.federated_head import read_fusion
from fedmerge.sequence.anchored import DECAY, RECENT, dense_maps, whitened, whitening
from fedmerge.server.choice import MERGED
from fedmerge.serving.decision import TEXT_MODELS, VECTORS_OF, group_of
from fedmerge.serving.model import RunDomain, ServedHead, ServedModel, chose_fusion, load_head
from fedmerge.serving.recommender import make_recommender

HEAD_TENSORS, HEAD_FILE = "head.safetensors", "head.json"
_IMPORTS = ("import torch", "from safetensors.torch import load_file", "from torch import nn")
_LOAD = f"""
with open(f"{{FOLDER}}/{HEAD_FILE}", encoding="utf-8") as file:
    head = json.load(file)
tensors = load_file(f"{{FOLDER}}/{HEAD_TENSORS}")
place, item_vectors = {{item: row for row, item in enumerate(head["item_ids"])}}, tensors["item_vectors"]
"""
_OWN = """
settings, items = head["settings"], tensors["item_representations"]
width = settings["hidden_size"]
block = nn.TransformerEncoderLayer(width, settings["heads"], width, batch_first=True, norm_first=True)
blocks = nn.TransformerEncoder(block, settings["layers"], nn.LayerNorm(width), enable_nested_tensor=False).eval()
blocks.load_state_dict({name[7:]: value for name, value in tensors.items() if name.startswith("blocks.")})


def head_scores(rows):
    read = rows[-settings["max_length"] :]
    hidden = items[read] * width**0.5 + tensors["positions"][: len(read)]
    mask = nn.Transformer.generate_square_subsequent_mask(len(read))
    return items @ blocks(hidden[None], mask=mask, is_causal=True)[0, -1]
"""
_RECENT = f"""

def recent_items_scores(rows):
    items = tensors["whitened_vectors"]
    read = items[rows[-{RECENT}:]]
    weights = torch.softmax(-{DECAY} * torch.arange(len(read) - 1, -1, -1.0), dim=0)
    return items @ nn.functional.normalize(weights @ read, dim=0)
"""
_FEDERATED = """

def federated_scores(rows):
    by_age, items = tensors["by_age"], tensors["whitened_vectors"]
    read = items[rows[-len(by_age) :]]
    attention = torch.softmax(read @ (tensors["attention"].T @ read[-1]) + by_age[: len(read)].flip(0), dim=0)
    state = nn.functional.normalize(attention @ read, dim=0)
    return items @ (tensors["item"].T @ state)
"""
_SCORE = '''

def standardise(scores):
    std = scores.std(correction=0)
    return (scores - scores.mean()) / std if std > 1e-6 * scores.abs().max() else torch.zeros_like(scores)


@torch.no_grad()
def score(history, keep_seen=False):
    """Return a score for each item of head["item_ids"]; history: item ids, oldest first."""
    rows = [place[item] for item in history]
    recent = reversed(rows[-text["max_items"] :])  # the text of a history begins with its most recent item
    read = text["item_separator"].join(head["item_texts"][row] for row in recent)
    user = torch.from_numpy(encode([text["history_prompt"] + read])[0])
    sources = {SOURCES}
    sources |= {"text": item_vectors @ user, "recent items": recent_items_scores(rows)}
    weights = head["weights"]["unmasked" if keep_seen else "masked"]
    scores = sum(weight * standardise(sources[name]) for name, weight in weights.items())
    if not keep_seen:
        scores[rows] = -torch.inf
    return scores.numpy()
'''


def export_served(
    place: RunDomain,
    served: ServedModel,
    out: Path,
    *,
    to: Format = "sentence-transformers",
    int8: bool = False,
    license: str | None = None,
) -> Deviation:
    """Write the served model as :func:`export_model` does; with a head also its tensors, settings and a recipe.

    Args:
        place: of :func:`fedmerge.serving.model.open_run`.
        served: of :func:`fedmerge.serving.model.load_served`.
        out: must be absent or empty; written complete or not at all.
        to: format of the encoder; a head is tensors and a recipe in each.
        int8: of the encoder.
        license: for the card; None: none is stated.

    Returns:
        How far the encoder's vectors are from the platform's own.

    Raises:
        ConfigError, BackboneError: as :func:`fedmerge.encoder.export.folder.export_model`.
        RunDirError: the folder is not empty, or cannot be written.
        ClientError: the head is not on this disk, or damaged.
    """
    check_format(to, int8)
    check_free(out)
    text, catalog, provenance = place.config.text, place.catalog, _provenance(served)
    model = served.decision.model
    own = None if model in (MERGED, BACKBONE, FEDERATED_HEAD, FEDERATED_FUSED) else place.manifest.name
    about = sections_of_run(place.run, label_of(served.decision.merge) if model == MERGED else model, own)
    write = partial(
        export_model,
        place.backbone,
        served.adapter,
        out,
        text,
        to=to,
        int8=int8,
        template=catalog.template,
        catalog=catalog,
        license=license,
    )
    if served.decision.model in TEXT_MODELS:
        personal = served.decision.model == PERSONAL
        warning = _warning(place.manifest.name, "coefficients were fitted to") + "\n\n" if personal else ""
        return write(provenance, sections=warning + about)
    vectors = make_recommender(place.backbone, served.adapter, place.catalog, text).item_vectors
    head = load_head(place, served, vectors)
    tensors = save(_tensors(head, vectors))
    record = _record(place, served, head) | {"sha256": hashlib.sha256(tensors).hexdigest()}

    def add_head(folder: Path) -> None:
        write_bytes(folder / HEAD_TENSORS, tensors)
        write_json(folder / HEAD_FILE, record)

    provenance["head"] = {"model": served.decision.model, "domain": place.manifest.name, "sha256": record["sha256"]}
    recipe = encode_recipe(to, _IMPORTS)
    return write(provenance, sections=_section(place, served, head, recipe) + about, add=add_head)


def kept_for(place: RunDomain, served: ServedModel) -> str | None:
    """Return why an export of a served model must stay within its organisation; None if it need not."""
    name, model = place.manifest.name, served.decision.model
    if model in VECTORS_OF:
        return f"its head was trained on the users of {name}"
    if model == PERSONAL:
        return f"its coefficients were fitted to the users of {name}"
    if model == WOVEN:
        return f"it is the merge of what {name} alone trained"
    group = group_of(place.run, name) if model == GROUP else None
    if model == EXPERT or (group is not None and len(group[1]) == 1):
        return f"it is the expert of {name} alone"
    if model not in TEXT_MODELS and not place.manifest.public_catalog:
        return f"it holds the texts of all items of {name}, whose catalog is not public"
    return None


def _warning(name: str, what: str) -> str:
    return (
        f"**Do not give this folder away.** Its {what} the users of {name}, without differential privacy, for\n{name} "
        f"itself; it never left {name} in the federation."
    )


def _provenance(served: ServedModel) -> dict[str, Any]:
    if served.adapter is None:
        return {"method": "backbone alone"}
    if served.source is not None:
        return provenance_of(served.source)
    sha256 = adapter_sha256(served.adapter)
    return {"method": served.decision.model, "domains": {served.decision.domain: sha256}, "sha256": sha256}


def _shared(head: ServedHead) -> Adapter | None:
    """Return the federated head, if the model reads it."""
    return head.head.anchor if isinstance(head.head, LocalHead) else head.head


def _tensors(head: ServedHead, item_vectors: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what scoring reads: an own head's blocks and representations, a federated head's maps."""
    kept = {"item_vectors": item_vectors, "whitened_vectors": whitened(item_vectors, whitening(item_vectors))}
    if isinstance(head.head, LocalHead):
        state = head.head.model.state_dict()
        with torch.no_grad():
            kept["item_representations"] = head.head.model.item_representations()
        kept |= {"positions": state["positions.weight"]}
        kept |= {name: tensor for name, tensor in state.items() if name.startswith("blocks.")}
    if (shared := _shared(head)) is not None:
        kept |= dense_maps(shared)
    return {name: tensor.detach().cpu().float().contiguous() for name, tensor in kept.items()}


def _record(place: RunDomain, served: ServedModel, head: ServedHead) -> dict[str, Any]:
    catalog, limits = place.catalog, place.config.text
    texts = [
        item_text(
            {name: values[index] for name, values in catalog.attributes.items()},
            place.backbone.tokenizer,
            limits.max_attribute_tokens,
            tuple(catalog.attributes),
            catalog.limits,
        )
        for index in range(len(catalog))
    ]
    names = source_names(head.head.anchor) if isinstance(head.head, LocalHead) else FEDERATED_SOURCES
    return {
        "model": served.decision.model,
        "domain": place.manifest.name,
        "settings": asdict(head.head.model.settings) if isinstance(head.head, LocalHead) else {},
        "weights": {variant: dict(zip(names, each, strict=True)) for variant, each in head.weights.items()},
        "max_items": limits.max_items,
        "item_ids": list(catalog.item_ids),
        "item_texts": texts,
    }


def _weights_from(place: RunDomain, served: ServedModel) -> str:
    """Return where the weights of a federated head's fusion are from; empty without a fusion."""
    if not served.fused:
        return ""
    if chose_fusion(place) or read_fusion(place.run) is None:
        return f"The weights of the fusion were chosen on users of {place.manifest.name}."
    return "The weights of the fusion are the mean of those that the training domains chose."


def _section(place: RunDomain, served: ServedModel, head: ServedHead, recipe: str) -> str:
    name, own, shared = place.manifest.name, isinstance(head.head, LocalHead), _shared(head) is not None
    warning = (
        _warning(name, "head was trained on")
        if own
        else f"Its head is the run's federated head. {_weights_from(place, served)}".strip()
    )
    sources = [*(['"head": head_scores(rows)'] if own else [])]
    sources += ['"federated head": federated_scores(rows)'] if shared else []
    recipe += _LOAD + _RECENT + (_OWN if own else "") + (_FEDERATED if shared else "") + _SCORE
    return f"""\
## The head

{warning}

`{HEAD_TENSORS}` and `{HEAD_FILE}` are a {served.decision.model} for the {len(place.catalog)} items of {name}. Scores
of the sources are each standardised over the catalog and summed with the weights in `{HEAD_FILE}`, one set for masked
and one for unmasked ranking. `sha256` there is that of `{HEAD_TENSORS}`. After a change of the catalog, export again.

```python
{recipe.replace("{SOURCES}", "{" + ", ".join(sources) + "}")}```
"""
