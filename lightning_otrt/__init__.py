"""Representation transfer by optimal transport (arXiv 2007.06737) for PyTorch Lightning."""

from lightning_otrt.analysis import RepresentationComparison, compare_representations
from lightning_otrt.callback import OTRTCallback
from lightning_otrt.distance import TransportResult, transport_distance
from lightning_otrt.gradients import WeightSuggestion, suggest_weight
from lightning_otrt.layers import LayerPair
from lightning_otrt.loading import load_teacher
from lightning_otrt.metrics import NeuronTransportDistance
from lightning_otrt.module import OTRTModule
from lightning_otrt.monitor import OTRTMonitor
from lightning_otrt.neurons import neurons
from lightning_otrt.schedules import CosineDecay, LinearWarmup
from lightning_otrt.transfer import RepresentationTransfer

__version__ = "0.1.0"

__all__ = [
    "CosineDecay",
    "LayerPair",
    "LinearWarmup",
    "NeuronTransportDistance",
    "OTRTCallback",
    "OTRTModule",
    "OTRTMonitor",
    "RepresentationComparison",
    "RepresentationTransfer",
    "TransportResult",
    "WeightSuggestion",
    "compare_representations",
    "load_teacher",
    "neurons",
    "suggest_weight",
    "transport_distance",
]
