"""Backends of `transition_matrix`."""

from cc4s_kernels import backends
from cc4s_kernels.ops.transition_matrix import reference

backends.register("transition_matrix", "reference", reference.transition_matrix)
