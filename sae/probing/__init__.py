"""Probe a dictionary's latents for labels and concepts: sparse probes, single features, splitting and absorption."""

from __future__ import annotations

from sae.probing.absorption import AbsorptionResult, ConceptResult, measure_absorption
from sae.probing.activations import LabelledActivations, read_activations
from sae.probing.concept_view import concept_sheet
from sae.probing.concepts import ConceptSearch, FoundFeature, find_concept
from sae.probing.data import DataFile, LabelledTexts, find_data
from sae.probing.examples import Examples
from sae.probing.settings import ConceptConfig, LetterConfig, ProbeConfig
from sae.probing.sparse_probes import MethodResult, ProbeResult, probe

__all__ = [
    "AbsorptionResult",
    "ConceptConfig",
    "ConceptResult",
    "ConceptSearch",
    "DataFile",
    "Examples",
    "FoundFeature",
    "LabelledActivations",
    "LabelledTexts",
    "LetterConfig",
    "MethodResult",
    "ProbeConfig",
    "ProbeResult",
    "concept_sheet",
    "find_concept",
    "find_data",
    "measure_absorption",
    "probe",
    "read_activations",
]
