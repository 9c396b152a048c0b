"""Messages between server and clients as Flower records, one file per kind of message.

================  ==============================================  =========================================
message           request                                         reply
================  ==============================================  =========================================
query.describe    empty                                           description_record
query.catalog     empty                                           catalog_record
train             empty, or round_request_record                  expert_record, or report_record
train.head        head_request_record, with model_records         head_reports_record
train.head_round  round_request_record                            expert_record, or report_record
train.personal    personal_request_record                         fitted_record
train.weave       weave_request_record                            woven_record
evaluate          evaluation_request_record, with model_records   metric_sums_record
query.cohort      cohort_record                                   pseudo_users_record
query.gradient    gradient_request_record                         gradient_record
query.layer_map   layer_map_request_record                        layer_map_record
query.similarity  similarity_request_record                       similarity_record
any                                                               error_record in its place; add_signature
================  ==============================================  =========================================

A reader stands beside each, ``read_…``. The messages of a secure sum are in :mod:`sim.app.messages.secure_sum`;
docs/messages.md has the fields. No other package knows record keys.
"""

from sim.app.messages.records.adapters import FLOAT32, ModelRecords, model_records
from sim.app.messages.records.arrays import array_values
from sim.app.messages.records.coefficients import (
    COHORT,
    GRADIENT,
    LAYER_MAP,
    GradientRequest,
    LayerMapRequest,
    cohort_record,
    gradient_record,
    gradient_request_record,
    layer_map_record,
    layer_map_request_record,
    pseudo_users_record,
    read_cohort,
    read_gradient,
    read_gradient_request,
    read_layer_map,
    read_layer_map_request,
    read_pseudo_users,
)
from sim.app.messages.records.description import (
    CATALOG,
    DESCRIBE,
    Description,
    Role,
    catalog_record,
    description_record,
    read_catalog,
    read_description,
)
from sim.app.messages.records.evaluation import (
    EVALUATE,
    OWN_EXPERT,
    EvaluationRequest,
    are_weights,
    evaluation_request_record,
    fusion_text,
    metric_sums_record,
    read_evaluation_request,
    read_fusion,
    read_metric_sums,
)
from sim.app.messages.records.heads import (
    FEDERATED,
    HEAD_REPORT_FIELDS,
    ROUND_HEAD,
    TRAIN_HEAD,
    HeadRequest,
    head_reports_record,
    head_request_record,
    read_head_reports,
    read_head_request,
    read_vectors,
)
from sim.app.messages.records.personal import (
    FIT_PERSONAL,
    PersonalRequest,
    fitted_record,
    personal_request_record,
    read_fitted,
    read_fitted_coefficients,
    read_personal_request,
)
from sim.app.messages.records.replies import (
    add_signature,
    arrays_sha256,
    content_sha256,
    contents,
    error_record,
    read_error,
    read_error_domain,
    read_signature,
    size_bytes,
)
from sim.app.messages.records.training import (
    LARGEST_COUNT,
    LARGEST_NUMBER,
    NOT_FRESH,
    SIGNALS,
    TRAIN,
    RoundRequest,
    expert_record,
    read_expert,
    read_report,
    read_round_request,
    read_signals,
    report_record,
    round_request_record,
    signals_record,
)
from sim.app.messages.records.weaving import (
    SIMILARITY,
    WEAVE,
    SimilarityRequest,
    WeaveRequest,
    read_mean_similarity,
    read_similarity,
    read_similarity_request,
    read_weave_request,
    read_woven,
    similarity_record,
    similarity_request_record,
    weave_request_record,
    woven_record,
)

__all__ = [
    "CATALOG",
    "COHORT",
    "DESCRIBE",
    "EVALUATE",
    "FEDERATED",
    "FIT_PERSONAL",
    "FLOAT32",
    "GRADIENT",
    "HEAD_REPORT_FIELDS",
    "LARGEST_COUNT",
    "LARGEST_NUMBER",
    "LAYER_MAP",
    "NOT_FRESH",
    "OWN_EXPERT",
    "ROUND_HEAD",
    "SIGNALS",
    "SIMILARITY",
    "TRAIN",
    "TRAIN_HEAD",
    "WEAVE",
    "Description",
    "EvaluationRequest",
    "GradientRequest",
    "HeadRequest",
    "LayerMapRequest",
    "ModelRecords",
    "PersonalRequest",
    "Role",
    "RoundRequest",
    "SimilarityRequest",
    "WeaveRequest",
    "add_signature",
    "are_weights",
    "array_values",
    "arrays_sha256",
    "catalog_record",
    "cohort_record",
    "content_sha256",
    "contents",
    "description_record",
    "error_record",
    "evaluation_request_record",
    "expert_record",
    "fitted_record",
    "fusion_text",
    "gradient_record",
    "gradient_request_record",
    "head_reports_record",
    "head_request_record",
    "layer_map_record",
    "layer_map_request_record",
    "metric_sums_record",
    "model_records",
    "personal_request_record",
    "pseudo_users_record",
    "read_catalog",
    "read_cohort",
    "read_description",
    "read_error",
    "read_error_domain",
    "read_evaluation_request",
    "read_expert",
    "read_fitted",
    "read_fitted_coefficients",
    "read_fusion",
    "read_gradient",
    "read_gradient_request",
    "read_head_reports",
    "read_head_request",
    "read_layer_map",
    "read_layer_map_request",
    "read_mean_similarity",
    "read_metric_sums",
    "read_personal_request",
    "read_pseudo_users",
    "read_report",
    "read_round_request",
    "read_signals",
    "read_signature",
    "read_similarity",
    "read_similarity_request",
    "read_vectors",
    "read_weave_request",
    "read_woven",
    "report_record",
    "round_request_record",
    "signals_record",
    "similarity_record",
    "similarity_request_record",
    "size_bytes",
    "weave_request_record",
    "woven_record",
]
