"""Commands on adapters: ``merge``, ``extract``, ``evaluate``, ``export`` and ``recommend``."""
