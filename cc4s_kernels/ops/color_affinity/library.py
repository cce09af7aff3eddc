"""Backends of `color_affinity`."""

from cc4s_kernels import backends
from cc4s_kernels.ops.color_affinity import reference

backends.register("color_affinity", "reference", reference.color_affinity)
