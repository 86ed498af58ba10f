"""Certified bounds on any logits function: no perturbation within eps lowers a margin below them.

    lower = margins(logits_fn, images, labels, eps=0.1, method='crown_ibp')  # [B, K]
    is_verified = verified(lower)  # [B]
    layers = intermediate(logits_fn, images, eps=0.1)  # what goes into every relu

The bounds hold for the network in exact arithmetic: with sound=True whatever the rounding, by the
theorem of docs/certificates.md; without, up to the rounding of the bounds themselves: about 1e-6 of
the largest term in float32, and 1e-15 with dtype=jnp.float64.
"""

from robustprune_jax.bounds.margins import (
    METHODS,
    NORMS,
    Layer,
    intermediate,
    label_spec,
    margins,
    problem,
    verified,
    without_error_term,
)
from robustprune_jax.bounds.unsafe import Answer, decide
from robustprune_jax.bounds.verify import Verdict, verify

__all__ = [
    'METHODS',
    'NORMS',
    'Answer',
    'Layer',
    'Verdict',
    'decide',
    'intermediate',
    'label_spec',
    'margins',
    'problem',
    'verified',
    'verify',
    'without_error_term',
]
