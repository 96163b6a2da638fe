"""YAML -> validated `Spec`."""

from rpac.spec.model import KV_LAYOUTS, TARGETS, Model, Serving, Spec, plain
from rpac.spec.parse import load_spec, parse_spec

__all__ = ["KV_LAYOUTS", "TARGETS", "Model", "Serving", "Spec", "load_spec", "parse_spec", "plain"]
