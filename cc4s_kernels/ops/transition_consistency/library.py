"""Backends of `transition_consistency`."""

from cc4s_kernels import backends
from cc4s_kernels.ops.transition_consistency import reference

backends.register("transition_consistency", "reference", reference.transition_consistency)
