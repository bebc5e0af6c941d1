"""Put a bundle in the place of a pipeline's transformer; the pipeline stays as it is.

python examples/run_in_a_pipeline.py runs/flux black-forest-labs/FLUX.1-dev "a red cube on a blue table"
"""

import sys
from pathlib import Path
from typing import Any

import adatsq_trt


def main(run: Path, pipe: Any, prompt: str, **options: Any) -> Any:
    """The pipeline's output."""
    with adatsq_trt.load(run) as bundle:
        pipe.transformer = bundle.transformer()
        return pipe(prompt, num_inference_steps=bundle.policy.steps, **options)


if __name__ == "__main__":
    from diffusers import DiffusionPipeline

    folder, model, text = sys.argv[1:]
    main(Path(folder), DiffusionPipeline.from_pretrained(model, transformer=None), text).images[0].save("picture.png")
