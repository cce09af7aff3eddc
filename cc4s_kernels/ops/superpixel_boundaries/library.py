"""Backends of `superpixel_boundaries`."""

from cc4s_kernels import backends
from cc4s_kernels.ops.superpixel_boundaries import reference

backends.register("superpixel_boundaries", "reference", reference.superpixel_boundaries)
