"""In-place optimizer updates of the touched rows of a table."""

from megamem_kernels.row_update.op import (
    TouchedRows,
    TouchedState,
    add_scaled_,
    lazy_adam_,
    momentum_,
    partial_rowwise_adam_,
    rowwise_adagrad_,
    sgd_,
)

__all__ = [
    "TouchedRows",
    "TouchedState",
    "add_scaled_",
    "lazy_adam_",
    "momentum_",
    "partial_rowwise_adam_",
    "rowwise_adagrad_",
    "sgd_",
]
