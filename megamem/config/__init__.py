"""Machinery of typed configuration; the sections are defined by the packages that use them."""

from megamem.config.base import above_zero, at_least, build, convert, merge, parse_override, to_dict, unknown_key

__all__ = ["above_zero", "at_least", "build", "convert", "merge", "parse_override", "to_dict", "unknown_key"]
