"""A service as one writes it without fedmerge, from an exported model: sentence-transformers, faiss, FastAPI.

python benchmarks/speed/plain_service.py EXPORT DOMAIN PORT
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer

from fedmerge.domain.catalog import load_catalog
from fedmerge.encoder.text import item_text, sequence_text

try:
    import faiss
except ImportError:
    faiss = None


class Body(BaseModel):
    """A request."""

    history: list[str]
    k: int = 10


def main() -> None:
    """Load, encode the catalog, and answer."""
    model, catalog = SentenceTransformer(sys.argv[1]), load_catalog(Path(sys.argv[2]))
    rows = zip(*catalog.attributes.values(), strict=True)
    texts = [item_text(dict(zip(catalog.attributes, row, strict=True)), model.tokenizer) for row in rows]
    vectors = model.encode(texts, normalize_embeddings=True)
    place = {item: row for row, item in enumerate(catalog.item_ids)}
    index = None if faiss is None else faiss.IndexFlatIP(vectors.shape[1])
    if index is not None:
        index.add(vectors)

    def search(user: Any, k: int) -> tuple[Any, Any]:
        if index is not None:
            scores, found = index.search(user, k)
            return scores[0], found[0]
        scores = vectors @ user[0]
        order = np.argpartition(-scores, k)[:k]
        order = order[np.argsort(-scores[order])]
        return scores[order], order

    app = FastAPI()

    @app.post("/recommend")
    def recommend(body: Body) -> dict[str, Any]:
        user = model.encode([sequence_text([texts[place[item]] for item in body.history])], normalize_embeddings=True)
        scores, found = search(user, body.k + len(body.history))
        pairs = [(catalog.item_ids[row], float(score)) for row, score in zip(found, scores, strict=True)]
        kept = [(item, score) for item, score in pairs if item not in body.history][: body.k]
        return {"recommendations": [{"item_id": item, "score": score} for item, score in kept]}

    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[3]), log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
