"""Tile choices of RPA v3 that others measured in served models: a second witness for the ranking, not for the time.

A served model's throughput holds more than attention, so only the sign and the rough size of a gain can agree.
"""

from __future__ import annotations

from dataclasses import dataclass

from rpa_v3 import Config, Tiles


@dataclass(frozen=True)
class Witness:
    """Choices of tiles with what was measured for each; the first is the baseline. contexts: lengths to predict."""

    title: str
    text: str
    target: str
    seqs: int
    contexts: tuple[int, ...]
    choices: tuple[tuple[Config, str], ...]


def _tpu7x(tiles: Tiles | None) -> Config:
    return Config("tpu7x", 4, 2, 128, 128, 10240, 128, 128, 8192, tiles, (16, 256, 16, 256))


def _v6e(tiles: Tiles) -> Config:
    return Config("v6e", 8, 2, 128, 256, 40960, 128, 128, 8192, tiles, (16, 256, 16, 256))


WITNESSES = (
    Witness(
        "TPU7x: fetch more than the kernel computes at once",
        "Measured, tpu-inference pull request 3102: by default, RPA v3 computes the whole block that it fetches, up to 16,384 "
        "tokens. Fetching 16,384 tokens and computing 4,096 of them at a time raised the decode throughput of a served model "
        "by 49% (from 64,929 to 96,273 tokens/s). This was the best of a sweep whose curve falls on both sides. The recipe "
        "(pull request 3165) names the model: Qwen3-0.6B over 4 devices, so 4 query heads and 2 KV heads on each device, with "
        "responses of up to 8,192 tokens. The prediction assumes 128 sequences, pages of 128 tokens, and a limit of 10,240 "
        "tokens.",
        "tpu7x",
        128,
        (1024, 4096, 8192),
        (
            (_tpu7x(None), "64,929 tokens/s"),
            (_tpu7x((1, 16384, 1, 8192)), "lower than the best"),
            (_tpu7x((1, 16384, 1, 4096)), "96,273 tokens/s (+49%)"),
            (_tpu7x((1, 16384, 1, 2048)), "lower than the best"),
        ),
    ),
    Witness(
        "v6e: a block that is too large",
        "Measured, sglang-jax issue 1044: Qwen3-8B over 4 devices (8 query heads and 2 KV heads on each device), with pages of "
        "256 tokens. Blocks of 1,024 tokens instead of 16,384 raised the output throughput by 19.6%. Computing 512 tokens at "
        "a time from such a block was less good.",
        "v6e",
        128,
        (1024, 2048, 4096),
        (
            (_v6e((1, 16384, 1, 16384)), "9,970 tokens/s"),
            (_v6e((1, 1024, 1, 1024)), "11,919 tokens/s (+19.6%)"),
            (_v6e((1, 1024, 1, 512)), "11,218 tokens/s (+12.5%)"),
        ),
    ),
)
