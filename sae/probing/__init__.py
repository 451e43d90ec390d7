"""Probe a dictionary's latents for labels: sparse probes compared with dense ones, splitting and absorption."""

from __future__ import annotations

from sae.probing.absorption import AbsorptionResult, ConceptResult, measure_absorption
from sae.probing.activations import LabelledActivations
from sae.probing.data import DataFile, LabelledTexts, find_data
from sae.probing.settings import LetterConfig, ProbeConfig
from sae.probing.sparse_probes import MethodResult, ProbeResult, probe

__all__ = [
    "AbsorptionResult",
    "ConceptResult",
    "DataFile",
    "LabelledActivations",
    "LabelledTexts",
    "LetterConfig",
    "MethodResult",
    "ProbeConfig",
    "ProbeResult",
    "find_data",
    "measure_absorption",
    "probe",
]
