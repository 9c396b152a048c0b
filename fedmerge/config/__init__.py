"""The validated configuration of an experiment. It imports neither torch nor transformers, so checking is fast."""

from fedmerge.config.contradictions.runs import too_few_for_krum
from fedmerge.config.experiment import ExperimentConfig
from fedmerge.config.files import (
    declared,
    describe_problem,
    flat_to_toml,
    flatten,
    from_flat,
    load_config,
    read_overrides,
    to_flat,
    to_toml,
    with_absolute_paths,
)
from fedmerge.config.head import Head, HeadInputs, HeadVectors
from fedmerge.config.merging import (
    LEARNED_METHODS,
    MIN_SUMMED,
    PRESET_KEYS,
    SEARCHED_METHODS,
    SUMMED_METHODS,
    SUMMED_RULES,
    AdaMerging,
    Merge,
    MergeMethod,
    MergeRec,
    Rmm,
    ThroughClients,
    teacher_problem,
)
from fedmerge.config.model import DEMO_ROOT, BackboneSection, Lora, Text
from fedmerge.config.personal import Directions, Personal
from fedmerge.config.privacy import DP, Privacy, Transport
from fedmerge.config.running import Admission, Baseline, Evaluation, Runtime, Simulation, Tracking
from fedmerge.config.section import ATTRIBUTE, ATTRIBUTES, DOMAIN_NAME, Section, Split
from fedmerge.config.training import RoundRule, Rounds, Train

__all__ = [
    "ATTRIBUTE",
    "ATTRIBUTES",
    "DEMO_ROOT",
    "DOMAIN_NAME",
    "DP",
    "LEARNED_METHODS",
    "MIN_SUMMED",
    "PRESET_KEYS",
    "SEARCHED_METHODS",
    "SUMMED_METHODS",
    "SUMMED_RULES",
    "AdaMerging",
    "Admission",
    "BackboneSection",
    "Baseline",
    "Directions",
    "Evaluation",
    "ExperimentConfig",
    "Head",
    "HeadInputs",
    "HeadVectors",
    "Lora",
    "Merge",
    "MergeMethod",
    "MergeRec",
    "Personal",
    "Privacy",
    "Rmm",
    "RoundRule",
    "Rounds",
    "Runtime",
    "Section",
    "Simulation",
    "Split",
    "Text",
    "ThroughClients",
    "Tracking",
    "Train",
    "Transport",
    "declared",
    "describe_problem",
    "flat_to_toml",
    "flatten",
    "from_flat",
    "load_config",
    "read_overrides",
    "teacher_problem",
    "to_flat",
    "to_toml",
    "too_few_for_krum",
    "with_absolute_paths",
]
