"""What a built program will do on a TPU: batches in words, the program that each selects, its schedule, the walk."""

from rpac.predict.batches import Workload, expected, parse_decode, parse_prefill, read_trace
from rpac.predict.plot import check_plot, draw
from rpac.predict.programs import Programs, programs_of
from rpac.predict.run import Prediction, emit, predict

__all__ = [
    "Prediction",
    "Programs",
    "Workload",
    "check_plot",
    "draw",
    "emit",
    "expected",
    "parse_decode",
    "parse_prefill",
    "predict",
    "programs_of",
    "read_trace",
]
