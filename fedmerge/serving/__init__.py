"""What a run serves a domain, at the organisation that owns the domain: load it, evaluate it, export it."""
