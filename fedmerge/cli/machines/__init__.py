"""Commands for machines of their own: the operator's ``deploy`` and an organisation's ``client``."""
