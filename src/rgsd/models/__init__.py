"""Models and tokenizers: loading, saving, identity, adapters, sharding, and fast CPU kernels."""

from rgsd.models.exporting import Rounding, export, save_model
from rgsd.models.identity import (
    base_identity,
    combined,
    digest_of_folder,
    fingerprint,
    identity,
    trained_identity,
    weights_digest,
)
from rgsd.models.integrity import check_finite, nonfinite_parameter
from rgsd.models.loading import load_model, load_tokenizer, load_trained, warn_of_ignored_trust
from rgsd.models.sources import EMBEDDED, EMBEDDED_WARM, NANO, source_of

__all__ = [
    "EMBEDDED",
    "EMBEDDED_WARM",
    "NANO",
    "Rounding",
    "base_identity",
    "check_finite",
    "combined",
    "digest_of_folder",
    "export",
    "fingerprint",
    "identity",
    "load_model",
    "load_tokenizer",
    "load_trained",
    "nonfinite_parameter",
    "save_model",
    "source_of",
    "trained_identity",
    "warn_of_ignored_trust",
    "weights_digest",
]
