"""Reads the keys of features as the table of features says."""

from __future__ import annotations

from typing import Any

from rpac.contract.features import Choice, Count, Feature, Flag, Number, features_of
from rpac.contract.features import Section as SectionName
from rpac.spec.nodes import Section


def read_features(section: Section, name: SectionName) -> dict[str, Any]:
    """The features of a section by key; the default for one that is not there, or cannot be read, which is reported."""
    return {feature.key: _read(section, feature) for feature in features_of(name)}


def _read(section: Section, feature: Feature) -> Any:
    if not section.has(feature.key):
        return feature.default
    value: Any
    match feature.values:
        case Flag():
            value = section.flag(feature.key)
        case Count(low, high, example):
            value = section.integer(feature.key, low, high, example)
        case Number(low, high):
            value = section.number(feature.key, low, high)
        case Choice(words):
            value = section.choice(feature.key, words)
    return feature.default if value is None else value
