"""The namespace of this build's torch ops. Written by `esmfold2-trimul build`."""

import torch

_NAMESPACE = "_esmfold2_trimul_kernel_4597dbbf51"

ops = getattr(torch.ops, _NAMESPACE)


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an op of this build, `<namespace>::<op_name>`."""
    return f"{_NAMESPACE}::{op_name}"
