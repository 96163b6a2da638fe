"""YAML -> validated `Spec`."""

from rpac.contract.attention import KV_LAYOUTS, Attention, Serving, plain
from rpac.spec.model import TARGETS, Spec
from rpac.spec.parse import load_spec, parse_spec

__all__ = ["KV_LAYOUTS", "TARGETS", "Attention", "Serving", "Spec", "load_spec", "parse_spec", "plain"]
