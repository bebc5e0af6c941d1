"""How well a quantized model's pictures show what was asked for, and how near they are to full precision."""
