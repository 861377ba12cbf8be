"""CUDA without a GPU: kernels are interpreted as PTX, tensors lie in host memory. README.md says what that can show."""
