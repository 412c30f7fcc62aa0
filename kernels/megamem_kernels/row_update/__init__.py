"""In-place optimizer updates of the touched rows of a table."""

from megamem_kernels.row_update.op import lazy_adam_, rowwise_adagrad_

__all__ = ["lazy_adam_", "rowwise_adagrad_"]
