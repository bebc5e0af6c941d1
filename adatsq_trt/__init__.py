"""adatsq-trt: timestep-aware mixed precision for diffusion transformers, down to TensorRT engines."""

__version__ = "0.1.0"
