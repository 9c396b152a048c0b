"""Contradictions between settings of several sections; every function yields one line for each contradiction."""
