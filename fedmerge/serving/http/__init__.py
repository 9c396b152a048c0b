"""The recommender over HTTP: ``fedmerge serve``. FastAPI and uvicorn are imported here and nowhere else."""
