"""Fine-tuning neural operators: TB_Sigmoid rates per layer, and PDEBench's data."""

from farms_fast.adapters.sciml.pdebench import (
    FIELDS,
    CompressibleFlow,
    read_pdebench,
    write_pdebench,
)
from farms_fast.adapters.sciml.tb_sigmoid import TBSigmoid

__all__ = ["FIELDS", "CompressibleFlow", "TBSigmoid", "read_pdebench", "write_pdebench"]
