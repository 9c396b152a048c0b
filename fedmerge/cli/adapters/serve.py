"""``fedmerge serve``."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.cli.options import adapter_config, add_domain, add_model, run_of

if TYPE_CHECKING:
    from fedmerge.cli.options import Commands
    from fedmerge.serving.http.shelf import Shelf


def add_commands(commands: "Commands") -> None:
    """Add the command to the parser."""
    serve = commands.add_parser("serve", help="answer requests for recommendations over HTTP")
    add_model(serve)
    add_domain(serve, "a domain folder")
    serve.add_argument("--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1, this machine alone)")
    serve.add_argument("--port", type=int, default=8000, help="port to bind (default: 8000); 0 takes a free one")
    serve.add_argument(
        "--api-key-file", type=Path, metavar="FILE", help="a key on the first line, which requests must give"
    )
    serve.add_argument("--in-stock", type=Path, metavar="FILE", help="ids of the items in stock, one a line")
    serve.add_argument(
        "--count-popularity",
        action="store_true",
        help="count the domain's interactions, for requests with popularity",
    )
    serve.add_argument(
        "--threads", type=int, default=None, metavar="N", help="threads that answer (default: one for each core)"
    )
    serve.add_argument(
        "--page",
        action="store_true",
        help="with a page at / that shows the lists of the run's models side by side; loads all that are here",
    )
    serve.set_defaults(command=_serve)


def _serve(options: argparse.Namespace) -> int:
    from fedmerge.errors import ConfigError

    config = adapter_config(options)
    threads = len(os.sched_getaffinity(0)) if options.threads is None else options.threads
    if threads < 1:
        raise ConfigError(f"--threads: found {threads}, expected at least 1.")
    try:
        from fedmerge.serving.http.server import bind, is_loopback, make_server, read_key
    except ImportError as error:
        raise ConfigError(
            f"serve: {error.name} is not installed. Install it: pip install 'fedmerge[serve]'."
        ) from error
    import torch

    from fedmerge.domain.manifest import read_manifest
    from fedmerge.serving.http.added import changes_file
    from fedmerge.serving.http.service import Service

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    key = None if options.api_key_file is None else read_key(options.api_key_file)
    bound = bind(options.host, options.port)  # an address that is taken is known before the model is loaded
    torch.set_num_threads(config.runtime.server_threads)
    changes = changes_file(config.cache_dir, read_manifest(options.domain).name)

    def load(model: str | None, served: str | None) -> "Shelf":
        return _load(options, model, served)

    service = Service(load, changes, threads, options.in_stock)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // threads))
    shelf, (host, port, *_) = service.shelf, bound.getsockname()
    print(f"{shelf.catalog.name}: {len(shelf.catalog):,} items, by {shelf.label}")
    if shelf.beside:
        print(f"the page at / compares it with: {', '.join(each.label for each in shelf.beside)}")
    for title, reason in shelf.absent.items():
        print(f"not on the page: {title}. {reason}")
    if key is None and not is_loopback(bound):
        print("without --api-key-file anybody who reaches this address can ask; items and models cannot be changed")
    bound.listen()  # who connects from now on is answered
    print(f"http://{f'[{host}]' if ':' in host else host}:{port}  (the routes: /docs)", flush=True)
    make_server(service, bound, key, options.page).run(sockets=[bound])
    return 0


def _load(options: argparse.Namespace, model: str | None, served: str | None) -> "Shelf":
    """Load what the command serves, or another model in its place."""
    import numpy as np

    from fedmerge.domain.changes import read_ids
    from fedmerge.domain.interactions import load_interactions
    from fedmerge.serving.batch import count_items
    from fedmerge.serving.filters import in_stock
    from fedmerge.serving.http.shelf import make_shelf
    from fedmerge.serving.model import open_recommender

    wanted = argparse.Namespace(**vars(options))
    if model is not None:
        wanted.adapter, wanted.model = model, None
    wanted.model = wanted.model if served is None else served
    config, run = adapter_config(wanted), run_of(wanted)
    opened = open_recommender(wanted.adapter, run, options.domain, config, wanted.model)
    catalog = opened.recommender.catalog
    counts = count_items(load_interactions(options.domain), len(catalog)) if options.count_popularity else None
    available = np.ones(len(catalog), dtype=np.bool_)
    if options.in_stock is not None:
        available = in_stock(catalog, opened.recommender.item_index, read_ids(options.in_stock))
    label = f"adapter {Path(wanted.adapter).resolve().name}" if opened.decision is None else opened.decision.model
    if wanted.adapter == "none":
        label = "backbone"
    shelf = make_shelf(opened, label, counts, available, config.cache_dir)
    if options.page:
        from fedmerge.serving.http.page.models import with_models_beside

        shelf = with_models_beside(shelf, options.domain, config)
    return shelf
