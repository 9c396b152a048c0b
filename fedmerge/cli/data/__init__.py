"""Commands on domain folders: ``data``."""
