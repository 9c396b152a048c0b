"""Commands on adapters: ``merge``, ``evaluate``, ``export`` and ``recommend``."""
