"""Draws the README's picture: a screenshot of a run's feature page, by Chromium through Playwright.

    python scripts/draw_readme_picture.py runs/quickstart FEATURE --chromium /usr/bin/chromium
"""  # fmt: skip

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

import sae
from sae.viewer import write_page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("feature", type=int)
    parser.add_argument("--chromium", default=None, help="browser; default: the one Playwright installed")
    parser.add_argument("--out", type=Path, default=Path("docs/features.png"))
    arguments = parser.parse_args()
    store = sae.Features(arguments.run)
    shown = list(dict.fromkeys([arguments.feature, *store.sorted_by("density", max_density=0.01)[:1000]]))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        page_path = Path(folder) / "page.html"
        write_page(store, shown, page_path, f"Features of {arguments.run.name}")
        browser = playwright.chromium.launch(executable_path=arguments.chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme="light")
        page.goto(f"{page_path.as_uri()}#{arguments.feature}")
        page.screenshot(path=str(arguments.out))
        browser.close()


if __name__ == "__main__":
    main()
