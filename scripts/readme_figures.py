"""README's picture and table of results, from the demo: `make docs-figures`.

The picture shows the demo's policy beside pictures in full precision, with one format everywhere and with the policy,
from the same noise. Its prompts and seeds are the first ones, not chosen.
"""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

import adatsq_trt
from adatsq_trt.files import write_bytes
from adatsq_trt.report.contact_sheet import grid
from adatsq_trt.report.summary import PolicyFigures, Summary
from adatsq_trt.report.theme import STYLE, format_colors
from benchmarks.document import replace_marked

ROOT = Path(__file__).parents[1]
DEMO, UNIFORM = ROOT / "runs" / "demo", ROOT / "runs" / "demo-uniform"
PICTURE = ROOT / "docs" / "figures" / "demo.png"
MODEL, TARGET, BASELINE, BEYOND, PROMPTS = "digits-flux", "sm120", "nvfp4", ("fp8",), range(10)
# Few samples: nothing is searched and no figure of this build is shown.
QUICK = {"selection_samples": 16, "held_out_samples": 16}


def uniform_bundle(policy: adatsq_trt.Policy) -> adatsq_trt.Bundle:
    """The same model with one format everywhere."""
    rows = [[BASELINE] * len(policy.layers)] * policy.steps
    own = adatsq_trt.Policy.from_steps(policy.model, policy.weights_sha256, policy.layers, rows)
    return adatsq_trt.build(MODEL, target=TARGET, output=UNIFORM, policy=own, **QUICK)


def pictures(bundle: adatsq_trt.Bundle, quantized: bool = True) -> np.ndarray:
    """One for each prompt, float32 [samples, height, width, channels] in [0, 1]."""
    noise, conditioning = bundle.noise([1000 + prompt for prompt in PROMPTS]), bundle.conditioning(list(PROMPTS))
    return np.asarray(bundle.decode(bundle.denoise(noise, conditioning, quantized=quantized)))


def draw(policy: adatsq_trt.Policy, formats: tuple[str, ...], rows: dict[str, np.ndarray]) -> bytes:
    """The policy as a map, and one row of pictures for each method, as PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        left, right = figure.subfigures(1, 2, width_ratios=(4, 5.6))
        _draw_policy(left, policy, formats)
        for axes, (title, images) in zip(right.subplots(len(rows), 1), rows.items(), strict=True):
            axes.imshow(grid(images), interpolation="nearest")
            axes.set_title(title, fontsize=8, loc="left")
            axes.axis("off")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _draw_policy(figure: SubFigure, policy: adatsq_trt.Policy, formats: tuple[str, ...]) -> None:
    """Steps from left to right, layers from top to bottom, a colour for each format."""
    colors = format_colors(formats)
    rows = [policy.assignments[index] for index in policy.step_assignments]
    axes = figure.subplots()
    axes.imshow(np.array([[to_rgb(colors[name]) for name in row] for row in rows]).swapaxes(0, 1), aspect="auto")
    axes.grid(visible=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("denoising step")
    axes.set_ylabel("layer")
    used = [name for name in formats if any(name in row for row in rows)]
    keys = [Patch(color=colors[name], label=name) for name in used]
    figure.legend(handles=keys, loc="outside upper center", ncols=len(used), frameon=False, fontsize=8)


def is_shown(policy: PolicyFigures, summary: Summary) -> bool:
    """Whether a policy has a row: those within the budgets, and fp8 beyond them.

    Of the kind of a returned simple policy there is no other row.
    """
    returned = summary.policies[0]
    if summary.replaced is not None and policy is not returned and policy.kind == returned.kind:
        return False
    return policy.within_limits or policy.name in {f"uniform {name}" for name in BEYOND}


def results_table(summary: Summary) -> str:
    """The demo's policy beside simpler ones, in what a card holds."""
    lines = [
        "| policy | bits per weight | activation bits | ms | engines | latent MSE |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for policy in (own for own in summary.policies if is_shown(own, summary)):
        costs, name = policy.costs, _name(policy, summary)
        cells = (
            name if policy.within_limits else f"{name}\\*",
            f"{policy.resident_bits:.2f}",
            f"{costs.activation_bits:.2f}",
            "" if costs.ms is None else f"{costs.ms:.5f}",
            str(policy.assignments),
            f"{policy.error:.2e} ± {policy.standard_error:.0e}".replace("e-0", "e-"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _name(policy: PolicyFigures, summary: Summary) -> str:
    """A row's name; what was returned in the place of the search's own policy is called what it is."""
    replaced = summary.replaced
    if policy is summary.policies[0]:
        return "**searched**" if replaced is None else f"**returned: {policy.kind.replace('_', '-')}**"
    return "search's own" if replaced is not None and policy.name == replaced.searched else policy.name


def main() -> None:
    """Write both."""
    bundle = adatsq_trt.load(DEMO / "bundle", backend="onnxruntime")
    policy, summary = bundle.policy, bundle.summary
    assert summary is not None, "the demo's run directory has its figures"
    full, uniform, searched = pictures(bundle, quantized=False), pictures(uniform_bundle(policy)), pictures(bundle)
    rows = {"full precision": full, f"uniform {BASELINE}": uniform, "searched policy": searched}
    rows[f"|uniform {BASELINE} - full precision|, 8 times"] = np.clip(8 * np.abs(uniform - full), 0, 1)
    rows["|searched policy - full precision|, 8 times"] = np.clip(8 * np.abs(searched - full), 0, 1)
    write_bytes(PICTURE, draw(policy, summary.formats, rows))
    replace_marked(ROOT / "README.md", "results", results_table(summary))


if __name__ == "__main__":
    main()
