"""Study: settings of sequence heads, the same grid for every kind of input, on validation users of one domain.

    python benchmarks/studies/study_head_settings.py data/amazon/Pantry --out head-settings.json
    python benchmarks/studies/study_head_settings.py data/amazon/Pantry --inputs text+ids --dropout 0.2 \
        --adapter runs/amazon3/merged/average-… --out head-settings.json

Every head is trained until five epochs bring nothing. Test is never read: one half of the validation users selects
epochs and weights of the fusion, the other half is reported, masked. Rows of an --out file that are there already are
not trained again.
"""

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from study_adapter_under_head import CONFIG, fused_rows, halves, vectors_of

from fedmerge.bench.ranking import backbone_of
from fedmerge.client.local_domain import open_domain
from fedmerge.config import load_config
from fedmerge.domain.splits import evaluation_examples
from fedmerge.encoder.lora import applied
from fedmerge.encoder.peft.folder import read_adapter
from fedmerge.files import write_json
from fedmerge.sequence.model import SequenceSettings
from fedmerge.sequence.training import train_sequence_model


def main(arguments: Sequence[str] | None = None) -> None:
    """Train a head for every cell of the grid and print its row."""
    options = _options(arguments)
    config = load_config(CONFIG, options.set)
    torch.set_num_threads(config.runtime.threads_per_client)
    backbone = backbone_of(config.backbone, config.runtime)
    domain = open_domain(options.domain, backbone, config.text)
    select, report = halves(evaluation_examples(domain.interactions, "valid", options.users, config.seed))
    adapter = None if options.adapter is None else read_adapter(options.adapter)
    with applied(backbone, adapter):
        items, users = vectors_of(domain, (select, report))
    rows = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    for cell in itertools.product(options.inputs, options.hidden_size, options.dropout, options.id_dropout):
        inputs, hidden_size, dropout, id_dropout = cell
        vectors = "backbone" if options.adapter is None else str(options.adapter)
        key = " ".join(map(str, (domain.manifest.name, config.seed, vectors, *cell)))
        if key in rows:
            continue
        settings = SequenceSettings(inputs=inputs, hidden_size=hidden_size, dropout=dropout, id_dropout=id_dropout)
        started = time.process_time()
        head, training = train_sequence_model(
            domain.training_sequences,
            len(domain.catalog),
            select,
            settings,
            config.seed,
            backbone.compute,
            None if inputs == "ids" else items,
        )
        seconds = time.process_time() - started
        scores = fused_rows(head, items, users, select, report)
        rows[key] = {"cpu_seconds": seconds, "best_epoch": training.best_epoch, **scores}
        print(key, rows[key], flush=True)
        if options.out:
            write_json(options.out, rows)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("domain", type=Path, help="a domain folder")
    parser.add_argument("--inputs", nargs="+", choices=("ids", "text", "text+ids"), default=["ids", "text+ids"])
    parser.add_argument("--hidden-size", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--dropout", nargs="+", type=float, default=[0.2, 0.5])
    parser.add_argument("--id-dropout", nargs="+", type=float, default=[0.2], help="ids alone do not read it")
    parser.add_argument("--adapter", type=Path, help="PEFT folder of the encoder (default: the backbone)")
    parser.add_argument("--users", type=int, default=8000, help="validation users, both halves (default: 8000)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change amazon3.toml")
    parser.add_argument("--out", type=Path, help="JSON file of rows, which more runs add to")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
