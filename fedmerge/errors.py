"""Errors that fedmerge raises on purpose. A message says where, what was found, what was expected and what to do.

FedMergeError
├── ConfigError (ValueError)           a setting of the experiment
├── DomainError (ValueError)           a domain folder or the data that goes into it
├── LayoutMismatchError (ValueError)   adapters or tensors that do not belong together
├── BackboneError (ValueError)         a backbone that is missing, damaged or not the expected one
├── MergeError                         a merge that cannot be computed
├── AggregationError                   a round of a federation that cannot be aggregated
├── ClientError                        a client that failed
│   └── DivergedError                  a training or an encoder that diverged
├── PolicyError                        something that the privacy policy forbids
├── DeploymentError                    the operator's side of a federation on several machines
├── RunDirError                        a run folder or a file in it
└── StorageError                       an address of shared storage, or what lies there
"""


class FedMergeError(Exception):
    """Base class of all errors raised on purpose."""


class ConfigError(FedMergeError, ValueError):
    """A setting of the experiment is wrong."""


class DomainError(FedMergeError, ValueError):
    """A domain folder, or the data that goes into it, is wrong."""


class LayoutMismatchError(FedMergeError, ValueError):
    """Adapters or tensors do not belong together."""


class BackboneError(FedMergeError, ValueError):
    """A backbone is missing, damaged, or not the expected one."""


class MergeError(FedMergeError):
    """A merge cannot be computed."""


class AggregationError(FedMergeError):
    """A round of a federation cannot be aggregated."""


class ClientError(FedMergeError):
    """A client failed, or too few clients are left."""


class DivergedError(ClientError):
    """The loss of a training or the scores of an encoder became NaN or infinite."""


class PolicyError(FedMergeError):
    """The privacy policy forbids this."""


class DeploymentError(FedMergeError):
    """The operator's side of a federation on several machines is set up wrongly, or does not run."""


class RunDirError(FedMergeError):
    """A run folder or a file in it cannot be created, written or read."""


class StorageError(FedMergeError):
    """An address of shared storage is wrong, cannot be reached, or holds something that is not whole."""
