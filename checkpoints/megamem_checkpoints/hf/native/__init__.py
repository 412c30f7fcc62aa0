"""Architectures that transformers knows, as targets of an export: no modelling code travels with them."""
