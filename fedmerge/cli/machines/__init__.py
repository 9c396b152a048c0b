"""Commands for federations on separate machines: the operator's ``deploy`` and an organisation's ``client``."""
