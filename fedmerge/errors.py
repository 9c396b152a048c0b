"""The errors fedmerge raises on purpose. Every message says where, what was found, what was expected and the remedy.

FedMergeError
├── ConfigError (ValueError)           a setting of the experiment
├── DomainError (ValueError)           a domain folder or the data that goes into it
├── LayoutMismatchError (ValueError)   adapters or tensors that do not belong together
├── BackboneError (ValueError)         a backbone that is missing, damaged or not the one announced
├── MergeError                         a merge that cannot be computed
├── AggregationError                   a round of a federation that cannot be aggregated
├── ClientError                        a client that failed, named
│   └── DivergedError                  its training
├── PolicyError                        something that the privacy policy does not let out
├── DeploymentError                    the operator's side of a federation on several machines
└── RunDirError                        a run folder
"""


class FedMergeError(Exception):
    """Root of all errors raised on purpose."""


class ConfigError(FedMergeError, ValueError):
    """A setting of the experiment is wrong."""


class DomainError(FedMergeError, ValueError):
    """A domain folder, or the data that goes into it, is wrong."""


class LayoutMismatchError(FedMergeError, ValueError):
    """Adapters or tensors that do not belong together."""


class BackboneError(FedMergeError, ValueError):
    """A backbone is missing, damaged, or not the one that was announced."""


class MergeError(FedMergeError):
    """A merge cannot be computed."""


class AggregationError(FedMergeError):
    """A round of a federation cannot be aggregated."""


class ClientError(FedMergeError):
    """A client failed, or too few of them are left."""


class DivergedError(ClientError):
    """A training whose loss, or an encoder whose scores are no numbers any more."""


class PolicyError(FedMergeError):
    """The privacy policy does not let this out."""


class DeploymentError(FedMergeError):
    """The operator's side of a federation on several machines is wrong, or does not run."""


class RunDirError(FedMergeError):
    """A run folder cannot be created, written or read."""
