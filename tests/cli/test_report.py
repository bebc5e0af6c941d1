"""`report` on a real run, and the page as a browser shows it."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from adatsq_trt.files import read_tensors, write_tensors

SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
LAPTOP, PHONE = 1280, 390
HEIGHT = 5200


def test_report_writes_the_page_and_its_figures(cli, reported: Path) -> None:
    ended = cli("report", reported, "--json")
    assert ended.warnings == []
    paths = json.loads(ended.out)
    assert paths["page"] == str(reported / "report.html")
    names = ("policy", "sensitivity", "memory", "time", "pareto", "steps", "check", "stages")
    assert paths["figures"] == [str(reported / "report" / f"{n}.{kind}") for n in names for kind in ("svg", "png")]
    page = (reported / "report.html").read_text()
    assert "check</dt>" in page
    assert "passed" in page
    assert page.count("data:image/png;base64,") == 3  # two maps, a colour bar
    assert page.count("data:image/webp;base64,") == 2  # the pictures, quantized and in full precision


def test_the_search_keeps_what_the_report_shows(built: Path) -> None:
    errors = read_tensors(built / "search" / "sensitivity.safetensors")["errors"]
    assert errors.shape == (3, 2, 17)
    assert (errors >= 0).all()
    assert errors[0].sum() > errors[2].sum()
    curves = read_tensors(built / "search" / "trajectory_errors.safetensors")
    assert {"chosen", "nvfp4", "fp8", "bf16"} <= set(curves)
    assert all(curve.shape == (3,) and curve[0] == 0 for curve in curves.values())
    assert 0 < curves["bf16"][-1] < curves["fp8"][-1] < curves["nvfp4"][-1]


def test_report_goes_where_it_is_told(cli, copy: Path, tmp_path: Path) -> None:
    ended = cli("report", copy, "--output", tmp_path / "elsewhere" / "page.html")
    assert ended.code == 0, ended.err
    assert "Not checked yet" in (tmp_path / "elsewhere" / "page.html").read_text()
    assert not (copy / "report.html").exists()


def test_runs_that_do_not_hold_together_are_refused(cli, copy: Path, tmp_path: Path) -> None:
    assert "is not a run directory" in cli("report", tmp_path).refusal
    assert "expected a name that ends in .html" in cli("report", copy, "--output", tmp_path / "page.pdf").refusal
    policy = json.loads((copy / "search" / "policy.json").read_text())
    policy["assignments"] = [["fp8"] * 17, ["nvfp4"] * 17]
    policy["step_assignments"] = [0, 1]
    (copy / "search" / "policy.json").write_text(json.dumps(policy))
    assert "is not the policy of the search" in cli("report", copy).refusal
    settings = (copy / "settings.json").read_text()
    (copy / "settings.json").write_text(settings.replace('"seed": 0', '"seed": 1'))
    assert "is of a later command than the build in this folder" in cli("report", copy).refusal
    (copy / "settings.json").write_text(settings)
    (copy / "stages" / "bundle.json").unlink()
    assert "stage 'bundle'" in cli("report", copy).refusal
    assert not (copy / "report.html").exists()


def test_a_table_of_other_places_is_refused(cli, copy: Path) -> None:
    file = copy / "search" / "sensitivity.safetensors"
    errors = read_tensors(file)["errors"]
    for damaged in ({"errors": errors[:, :1]}, {"errors": errors * float("nan")}, {"other": errors}):
        write_tensors(file, damaged)
        assert "sensitivity.safetensors', 'errors': got" in cli("report", copy).refusal


def test_a_loop_that_fails_is_shown(cli, reported: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(reported, tmp_path / "run"))
    check = json.loads((run / "check" / "check.json").read_text())
    check["loop"] |= {"fail_above": 1e-9, "passed": False}
    check["loop"]["rows"][0] |= {"passed": False, "error": None}
    (run / "check" / "check.json").write_text(json.dumps({**check, "passed": False}))
    assert cli("report", run).code == 0
    page = (run / "report.html").read_text()
    total = len(check["rows"]) + len(check["loop"]["rows"]) + 1
    assert f"2 of {total} comparisons leave their limits" in page
    assert "loop, latent so far" in page
    assert "loop, last latent" in page


# ------------------------------------------------------------------------------------------- in a browser

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

# A phone is narrower than a browser's window may be, so the page is shown in a frame.
FRAME = """<!doctype html><meta charset="utf-8"><style>* {{ margin: 0 }} iframe {{ border: 0; display: block }}</style>
<iframe width="{width}" height="{height}" srcdoc="{page}"></iframe>"""
# Points at a place of the first map and writes down what the page does.
PROBE = """<script>onload = () => {
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  const image = page.querySelector("#policy image"), box = image.getBoundingClientRect();
  const place = { clientX: box.left + box.width * 0.75, clientY: box.top + box.height / 34, bubbles: true };
  const before = [...page.querySelectorAll(".mark")].filter((mark) => !mark.hidden).length;
  image.dispatchEvent(new page.defaultView.PointerEvent("pointermove", place));
  const marks = [...page.querySelectorAll(".mark")].map((mark) => mark.style.cssText);
  const shown = [...page.querySelectorAll(".mark")].filter((mark) => !mark.hidden).length;
  const text = page.getElementById("place").textContent;
  const input = page.querySelector(".slide input"), slider = page.getElementById("slider");
  input.value = 25;
  input.dispatchEvent(new page.defaultView.Event("input"));
  const clip = page.defaultView.getComputedStyle(slider.children[1]).clipPath;
  const sizes = [...slider.querySelectorAll("img")].map((one) => [one.clientWidth, one.clientHeight]);
  const overflow = root.scrollWidth - root.clientWidth;
  const found = { before, shown, marks, text, overflow, clip, sizes };
  document.body.textContent = "PROBED" + JSON.stringify(found) + "PROBED";
}</script>"""


def browse(tmp_path: Path, page: Path, width: int, *options: str, probe: str = "") -> str:
    """Show a page in a frame of this width; what the browser prints."""
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width, height=HEIGHT, page=html.escape(page.read_text())) + probe)
    command = [
        *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
        *(f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},{HEIGHT}", *options, f"file://{frame}"),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@needs_chromium
@pytest.mark.parametrize(
    ("name", "width", "dark"), [("laptop", LAPTOP, False), ("phone", PHONE, False), ("dark", LAPTOP, True)]
)
def test_screenshots(reported: Path, tmp_path: Path, name: str, width: int, dark: bool) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    file = SCREENSHOTS / f"report-{name}.png"
    file.unlink(missing_ok=True)
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    browse(tmp_path, reported / "report.html", width, scheme, f"--screenshot={file}")
    with Image.open(file) as image:
        assert image.size == (width, HEIGHT)
        grey = image.convert("L")
    corner = grey.getpixel((4, 4))
    assert corner < 40 if dark else corner > 245
    levels = grey.crop((0, 0, width, 700)).getextrema()
    assert levels[1] - levels[0] > 180  # there is ink on the paper


@needs_chromium
@pytest.mark.parametrize("width", [LAPTOP, PHONE])
def test_pointing_at_a_map_marks_the_place_in_both(reported: Path, tmp_path: Path, width: int) -> None:
    printed = browse(tmp_path, reported / "report.html", width, "--dump-dom", probe=PROBE)
    found = json.loads(html.unescape(printed.split("PROBED")[1]))
    assert (found["before"], found["shown"]) == (0, 2)
    left, right = (re.findall(r"(left|top|width|height): ([\d.]+)px", mark) for mark in found["marks"])
    assert [name for name, _ in left] == ["left", "top", "width", "height"]
    assert [float(value) for _, value in left] == pytest.approx([float(value) for _, value in right], abs=1)
    policy = json.loads((reported / "policy.json").read_text())
    chosen = policy["assignments"][policy["step_assignments"][1]][0]
    assert found["text"].startswith(f"{policy['layers'][0]} at step 1 (σ = ")
    assert f"computes in {chosen}latent MSE alone: nvfp4 " in found["text"]
    assert found["clip"] == "inset(0px 75% 0px 0px)"  # a quarter of the pictures is quantized
    assert found["sizes"][0] == found["sizes"][1]
    assert found["overflow"] <= 0  # the page does not scroll sideways
