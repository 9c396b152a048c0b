"""``fedmerge recommend``."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import adapter_config, add_model, run_of

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands
    from fedmerge.recommender import ScoreKind
    from fedmerge.serving.decision import Decision

SCORES = {"cosine": "cosine similarity", "standardised": "scores standardised over the catalog"}


def add_commands(commands: "Commands") -> None:
    """Add the command to the parser."""
    recommend = commands.add_parser("recommend", help="recommend items of a catalog given a history")
    add_model(recommend)
    recommend.add_argument("--domain", type=Path, required=True, metavar="DIR", help="only its catalog is read")
    recommend.add_argument(
        "--history", required=True, metavar="ID,…", help="item ids, oldest first, separated by commas"
    )
    recommend.add_argument("-k", type=int, default=10, help="number of items (default: 10)")
    recommend.add_argument(
        "--keep-seen", action="store_true", help="allow items of the history among the recommendations"
    )
    recommend.add_argument("--json", action="store_true", help="machine-readable output")
    recommend.set_defaults(command=_recommend)


def _recommend(options: argparse.Namespace) -> int:
    config = adapter_config(options)

    import torch

    from fedmerge.domain.catalog import load_catalog
    from fedmerge.domain.manifest import read_manifest
    from fedmerge.escaping import one_line
    from fedmerge.recommender import check_request, index_items, load_recommender, recommend
    from fedmerge.serving.model import load_served, open_run, served_recommender

    torch.set_num_threads(config.runtime.server_threads)
    manifest = read_manifest(options.domain)
    history = [item.strip() for item in options.history.split(",") if item.strip()]
    check_request(manifest.name, index_items(load_catalog(options.domain)), history, options.k)
    run, decision = run_of(options), None
    if run is None:
        recommender = load_recommender(options.adapter, options.domain, config)
    else:
        place = open_run(run, options.domain, config)
        served = load_served(place, options.model)
        recommender, decision = served_recommender(place, served), served.decision
    found = recommend(recommender, history, options.k, options.keep_seen)
    titles = recommender.catalog.titles
    if options.json:
        result = {
            "domain": manifest.name,
            "synthetic": manifest.synthetic,
            **({"adapter": options.adapter} if decision is None else _of_run(decision, recommender.score_kind)),
            "precision": recommender.encoder.compute.precision,
            "keep_seen": options.keep_seen,
            "history": [{"item_id": item, "title": titles[recommender.item_index[item]]} for item in history],
            "recommendations": [asdict(recommendation) for recommendation in found],
        }
        print(json.dumps(result, indent=2, ensure_ascii=False))
        return 0
    print(f"{manifest.name}{' (SYNTHETIC DATA)' if manifest.synthetic else ''}: history")
    for item in history:
        print(f"             {item}  {one_line(titles[recommender.item_index[item]]) or '(no title)'}")
    if decision is not None:
        print(f"served: {decision.model} ({decision.reason})")
    print(f"recommended, with {SCORES[recommender.score_kind]}:")
    for number, one in enumerate(found, start=1):
        print(f"{number:3}  {one.score:7.4f} {one.item_id}  {one_line(one.title) or '(no title)'}")
    return 0


def _of_run(decision: "Decision", score_kind: "ScoreKind") -> dict[str, str]:
    return {"run": str(decision.run), "model": decision.model, "reason": decision.reason, "score_kind": score_kind}
