"""Backends of `potts`."""

from cc4s_kernels import backends
from cc4s_kernels.ops.potts import reference

backends.register("potts", "reference", reference.potts)
