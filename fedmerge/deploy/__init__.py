"""The operator's side of a deployment: certificates, configuration files, bundles. Flower itself: ``sim``."""
