"""YAML -> validated `Spec`."""

from rpac.spec.model import TARGETS, Model, Serving, Spec
from rpac.spec.parse import load_spec, parse_spec

__all__ = ["TARGETS", "Model", "Serving", "Spec", "load_spec", "parse_spec"]
