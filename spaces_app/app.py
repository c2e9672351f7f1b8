"""The Space: see inside a model's weights in the browser.

    python spaces_app/app.py [FOLDER …]

The folders are models that visitors may choose beside the Hub's; nothing else of this machine can be reached. The port
is `GRADIO_SERVER_PORT`, 7860 by default; `GRADIO_MCP_SERVER=True` serves the endpoints to MCP clients too (with
`gradio[mcp]`). `LMD_SPACE_SECONDS` and `LMD_SPACE_MEMORY_GB` bound one request.
"""

import argparse
import threading
from pathlib import Path

from catalogue import Catalogue
from jobs import Jobs, Limits
from service import Service
from store import Store
from view import HEAD, build, style, theme


THREADS = 100  # requests that wait for workers take one each, and pages are to be answered meanwhile


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="See inside a model's weights in the browser.")
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="local models to offer, in Hub layout")
    folders = parser.parse_args().folders
    for folder in folders:
        if not folder.is_dir():
            parser.error(f"{folder}: no such folder; give folders with a config.json and weights")
    jobs = Jobs(Limits.here())
    service = Service(
        Catalogue({f"local: {folder.resolve().name}": folder.resolve() for folder in folders}), jobs, Store()
    )
    page = build(service)
    threading.Thread(target=jobs.warm_up, daemon=True).start()
    try:
        page.queue().launch(
            theme=theme(), css=style(), head=HEAD, footer_links=["api"], show_error=True, ssr_mode=False, share=False,
            max_file_size=0, state_session_capacity=200, max_threads=THREADS,
        )  # fmt: skip
    finally:
        jobs.close()


if __name__ == "__main__":
    main()
