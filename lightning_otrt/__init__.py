from lightning_otrt.distance import TransportResult, transport_distance
from lightning_otrt.neurons import neurons
from lightning_otrt.schedules import CosineDecay, LinearWarmup
