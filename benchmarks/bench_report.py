"""How long the committed reports take to open in a headless Chromium, until everything is drawn.

Run: python benchmarks/bench_report.py   (needs chromium and chromedriver on PATH)
"""

import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarks.measure import report
from experiment.files import ROOT
from tests.browser import CHROMEDRIVER, CHROMIUM, MISSING, open_browser


def main() -> None:
    if CHROMIUM is None or CHROMEDRIVER is None:
        sys.exit(MISSING)
    with tempfile.TemporaryDirectory() as profile, open_browser(Path(profile)) as browser:
        for page in sorted(ROOT.glob("results/*/*/report.html")):
            took = []
            for _ in range(5):
                browser.open(page)
                took.append(browser.run("return performance.getEntriesByType('navigation')[0].loadEventEnd"))
            report(f"{page.relative_to(ROOT)} ({page.stat().st_size / 1e6:.1f} MB)", median(took), "ms", "1000")


if __name__ == "__main__":
    main()
