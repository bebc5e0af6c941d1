"""adatsq-trt: timestep-aware mixed precision for diffusion transformers, down to TensorRT engines."""

__version__ = "0.2.0.dev0"
