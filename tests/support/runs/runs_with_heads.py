"""A finished run and, in the cache of one organisation's client, a head of its own; nothing of it came by Flower."""

from pathlib import Path

import torch
from run_folders import Place, make_run

from fedmerge.adapter import Adapter, LoraModule, adapter_sha256
from fedmerge.client.heads.heads import LocalHead, load_or_train_head
from fedmerge.client.local_domain import open_domain
from fedmerge.config import ExperimentConfig, load_config
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.files import read_record, seal, write_json
from fedmerge.merging.candidate import Candidate, Provenance
from fedmerge.runs.federated_head import read_federated_head, write_federated_head
from fedmerge.sequence.anchored import text_head

DOMAIN = "toys"
HEAD = ["head.hidden_size=8", "head.max_epochs=3", "head.max_minutes=none"]


def make_run_with_heads(place: Place, run_id: str = "heads", kind: str = "local") -> Path:
    """Write a run whose settings name heads; it serves every domain the merge until :func:`serve` says otherwise."""
    settings = ["merge.methods=average", f"cache_dir={place.root / 'cache'}", *HEAD, f"head.kind={kind}"]
    run = make_run(place, run_id, settings)
    serve(run, "merged")
    if kind == "federated":
        start = text_head(place.backbone().width, 2, 50, seed=0)
        drawn = torch.Generator().manual_seed(0)
        trained = Adapter(
            {
                name: LoraModule(module.lora_A, 0.3 * torch.randn(module.lora_B.shape, generator=drawn), 1.0)
                for name, module in start.modules.items()
            }
        )
        provenance = Provenance("federated head", {}, sha256=adapter_sha256(trained))
        write_federated_head(run, Candidate(trained, provenance), "backbone")
    return run


def serve(run: Path, model: str, domain: str = DOMAIN) -> None:
    """Let the run's choice serve a domain this model."""
    choice = read_record(run / "choice.json")
    write_json(run / "choice.json", seal({**choice, "per_domain": {domain: {"serve": model}}}))


def config_of(run: Path) -> ExperimentConfig:
    return load_config(run / "config.toml")


def train_head(place: Place, run: Path, vectors: str = "merge") -> LocalHead:
    """Train the head of DOMAIN as its client does in the run; it lies in the client's cache then."""
    config = config_of(run)
    domain = open_domain(place.domains / DOMAIN, place.backbone(), config.text)
    folders = {"merge": run / "merged" / "average", "expert": run / "adapters" / DOMAIN}
    adapter = read_adapter(folders[vectors]) if vectors in folders else None
    limit = config.evaluation.validation_users
    shared = read_federated_head(run) if vectors == "merge" else None
    return load_or_train_head(domain, adapter, config.head, limit, config.seed, config.cache_dir, anchor=shared)
