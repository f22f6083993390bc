"""The kernels on an NVIDIA GPU: their numbers checked, their times taken beside their peers'."""
