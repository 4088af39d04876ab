"""Screenshots of the HTML report for the manual, by Chromium without a window."""

import io
import shutil
import subprocess
import tempfile
from pathlib import Path

from PIL import Image

from benchmarks.measured import Chip
from benchmarks.report import page, plots
from benchmarks.report.__main__ import write

from .example import chip as example_chip

SIZE = (1200, 1500)
SCHEMES = {"light": 1, "dark": 0}  # Blink's numbers


def take(chips: list[Chip], out: Path) -> list[Path]:
    """Write report_light.webp and report_dark.webp: the top of a chip's report.

    Args:
        chips: The report of the first GPU, else of the first; of none, of example data.
        out: Their folder.

    Raises:
        FileNotFoundError: There is no Chromium.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise FileNotFoundError("--report: expected chromium or google-chrome on the path")
    chip = min(chips, key=lambda c: c.is_cpu, default=None) or example_chip()
    svgs = {name: svg for name, (svg, _) in plots.draw(chip).items()}
    out.mkdir(parents=True, exist_ok=True)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        html = Path(folder, "report.html")
        html.write_text(page.render(chip, svgs))
        for scheme, number in SCHEMES.items():
            shot = Path(folder, f"{scheme}.png")
            subprocess.run(
                [
                    browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                    f"--user-data-dir={folder}/profile", f"--window-size={SIZE[0]},{SIZE[1]}",
                    f"--blink-settings=preferredColorScheme={number}", f"--screenshot={shot}",
                    f"file://{html}",
                ],
                check=True, capture_output=True,
            )  # fmt: skip
            content = io.BytesIO()
            Image.open(shot).convert("RGB").save(content, "webp", lossless=True, method=6)
            found.append(out / f"report_{scheme}.webp")
            write(found[-1], content.getvalue())
    return found
