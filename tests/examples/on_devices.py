"""Serves a checkpoint on several CPU devices that share the heads, and prints what differs from dense attention.

Run with the number of devices, a folder, and XLA_FLAGS for as many: JAX counts devices when it starts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from serve.bundle import open_bundle
from serve.checkpoint import load_params
from serve.config import read_config
from serve.generate import Generator, Request
from serve.load import compare, requests
from serve.steps import JitSteps
from serve.tiny import write_checkpoint
from served import SMALL, spec_of, write_small_bundle


def main(folder: Path, count: int) -> None:
    write_checkpoint(folder, {**SMALL, "vocab_size": 264})  # so that the devices can share it
    bundle = folder / "model.rpac"
    write_small_bundle(bundle, spec_of(folder, devices=count))
    steps = open_bundle(str(bundle), folder, "cpu")
    assert isinstance(steps, JitSteps)
    weight = steps._params["layers"][0]["gate"]
    assert len(weight.sharding.device_set) == count
    assert weight.addressable_shards[0].data.shape == (weight.shape[0], weight.shape[1] // count)
    config = read_config(folder)
    load = requests(12, config.vocabulary, np.random.default_rng(2), rate=1)
    generator = Generator(steps)
    names = {generator.add(Request(one.prompt, one.max_new_tokens)): one for one in load}
    while generator.scheduler.running or generator.scheduler.waiting:
        for token in generator.step():
            names[token.request].tokens.append(token.token)
    verdict = compare(config, load_params(folder, config), load, 128)
    print(f"{verdict.tokens} tokens, {verdict.ties} ties", *verdict.wrong, sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[2]), int(sys.argv[1]))
