"""Machinery of typed configuration; the sections are defined by the packages that use them."""

from megamem.config.base import build, convert, merge, parse_override, to_dict, unknown_key

__all__ = ["build", "convert", "merge", "parse_override", "to_dict", "unknown_key"]
