"""The traffic of one optimizer step inside a memory group: ids to owners, rows back, patches, gradients to owners."""

from megamem.memory.exchange.exchange import Exchange
from megamem.memory.exchange.nodes import Link, NodeLayout
from megamem.memory.exchange.requests import Requests

__all__ = ["Exchange", "Link", "NodeLayout", "Requests"]
