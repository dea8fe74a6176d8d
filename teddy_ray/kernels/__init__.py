"""C++ kernels for frozen models on CPUs in float32, built on first use, as differentiable operators of PyTorch."""
