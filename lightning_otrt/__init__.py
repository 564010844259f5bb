"""Representation transfer by optimal transport (arXiv 2007.06737) for PyTorch Lightning."""

from lightning_otrt.analysis.compare import compare_representations
from lightning_otrt.analysis.comparison import RepresentationComparison
from lightning_otrt.analysis.metric import NeuronTransportDistance
from lightning_otrt.analysis.plot_curves import plot_history, plot_singular_values
from lightning_otrt.analysis.plot_layers import plot_distances
from lightning_otrt.analysis.plot_plans import plot_cost, plot_plan
from lightning_otrt.analysis.weight import WeightSuggestion, suggest_weight
from lightning_otrt.distillation import LogitDistillation
from lightning_otrt.fixed_views import FixedViews
from lightning_otrt.layers.pairs import LayerPair, LayerSpec
from lightning_otrt.notices import TransferWarning
from lightning_otrt.reading.neurons.reader import neurons
from lightning_otrt.schedules import CosineDecay, LinearWarmup, Schedule
from lightning_otrt.steps.pair_distance import PairDistance
from lightning_otrt.teacher.cache.options import TeacherCache
from lightning_otrt.teacher.loading.load import TeacherSource, load_teacher
from lightning_otrt.trainer.callback import OTRTCallback
from lightning_otrt.trainer.module import OTRTModule
from lightning_otrt.trainer.monitor import OTRTMonitor
from lightning_otrt.trainer.transfer_callback import TransferCallback
from lightning_otrt.transfer import RepresentationTransfer
from lightning_otrt.transport.distance import TransportResult, transport_distance

__version__ = "0.2.0"

__all__ = [
    "CosineDecay",
    "FixedViews",
    "LayerPair",
    "LayerSpec",
    "LinearWarmup",
    "LogitDistillation",
    "NeuronTransportDistance",
    "OTRTCallback",
    "OTRTModule",
    "OTRTMonitor",
    "PairDistance",
    "RepresentationComparison",
    "RepresentationTransfer",
    "Schedule",
    "TeacherCache",
    "TeacherSource",
    "TransferCallback",
    "TransferWarning",
    "TransportResult",
    "WeightSuggestion",
    "compare_representations",
    "load_teacher",
    "neurons",
    "plot_cost",
    "plot_distances",
    "plot_history",
    "plot_plan",
    "plot_singular_values",
    "suggest_weight",
    "transport_distance",
]
