"""Run against run: what differs in settings, scores, costs and privacy."""
