"""fedmerge: one recommender from many organisations that share no user data."""

__version__ = "0.1.0"
