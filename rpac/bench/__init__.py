"""Times the programs of a bundle on the device that they were built for, beside what was predicted.

    batches.py -> inputs.py -> verify.py -> time.py, profile.py -> result.py;  machine.py, stream.py;  run.py runs them all

Nothing is timed before every program has given the oracle's output on the batch that it is timed on.
"""
