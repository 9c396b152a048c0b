"""A client's own sequence heads: item vectors, trained models, and their ranks. Nothing of them leaves the client."""
