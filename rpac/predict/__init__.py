"""What a built program will do on a TPU: batches in words, the program that each selects, its schedule, the walk."""

from rpac.predict.batches import Asked, expected, expected_decode, parse_decode, parse_prefill
from rpac.predict.plot import check_plot, draw
from rpac.predict.programs import Programs, layers_in, names_apart, programs_of
from rpac.predict.run import Prediction, check_emit, emit, needed_work, predict, predict_on
from rpac.traffic.trace import Workload, read_trace

__all__ = [
    "Asked",
    "Prediction",
    "Programs",
    "Workload",
    "check_emit",
    "check_plot",
    "draw",
    "emit",
    "expected",
    "expected_decode",
    "layers_in",
    "names_apart",
    "needed_work",
    "parse_decode",
    "parse_prefill",
    "predict",
    "predict_on",
    "programs_of",
    "read_trace",
]
