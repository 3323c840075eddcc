"""Pages of the documentation site that do not lie in `docs/`: hooks of mkdocs, named in mkdocs.yml.

README, guide, model cards and the like stay where GitHub shows them; tutorials are executed notebooks. Their links,
and those of `docs/`, are written for GitHub, and followed here to where the site has what they point to.
"""

import base64
import json
import posixpath
import re
import subprocess
import sys
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).parents[2]
# Where the site has what lies elsewhere.
PLACES = {
    "README.md": "index.md",
    "training/README.md": "guide.md",
    "model_cards/README.md": "model_cards.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "LICENSE": "LICENSE.txt",
    "CITATION.cff": "CITATION.cff",
    **{
        f"model_cards/released/{path.parent.name}/README.md": f"released/{path.parent.name}.md"
        for path in ROOT.glob("model_cards/released/*/README.md")
    },
}
NOTEBOOKS = {
    f"docs/tutorials/{path.name}": f"tutorials/{path.stem}.md" for path in ROOT.glob("docs/tutorials/*.ipynb")
}
SOURCES = {place: source for source, place in (PLACES | NOTEBOOKS).items()}


def on_files(files, config):
    """Add them."""
    for source, place in PLACES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    for source, place in NOTEBOOKS.items():
        text, pictures = page_of_notebook(ROOT / source)
        files.append(File.generated(config, place, content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    files.append(File.generated(config, "commands.md", content=page_of_commands()))
    return files


def on_page_markdown(markdown, page, **_):
    """Links to files of the checkout, followed to the site."""
    here = page.file.src_uri
    if page.parent is None:
        page.meta["hide"] = ["navigation"]  # a page of no section has no neighbours to show
    folder = posixpath.dirname(SOURCES.get(here, f"docs/{here}"))

    def follow(match):
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        place = (PLACES | NOTEBOOKS).get(path, path.removeprefix("docs/"))
        if place == path:
            return match[0]
        return f"]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{match[2] or ''})"

    return re.sub(r"\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)", follow, markdown)


def on_page_content(html, page, **_):
    """What docstrings have of the style of transformers: [`Name`] becomes a link, where the site has its page, and
    (`int`, *optional*, defaults to 4) loses its marks."""
    if not page.file.src_uri.startswith("api/"):
        return html
    html = re.sub(r"<code>[^<]*(?:`|\*optional\*)[^<]*</code>", lambda match: re.sub("[`*]", "", match[0]), html)
    link = r'<autoref optional identifier="bridle_hf.\1"><code>\1</code></autoref>'
    return re.sub(r"\[<code>~?([\w.]+)</code>\]", link, html)


def page_of_commands() -> str:
    """What `bridle --help` and `bridle COMMAND --help` print."""

    def section(title: str, *words: str) -> str:
        command = [sys.executable, "-m", "bridle_hf.commands", *words, "--help"]
        text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        return f"{title}\n\n```text\n{text.rstrip()}\n```"

    overview = section("# Commands")
    names = re.findall(r"^  (\w+) ", overview, re.MULTILINE)
    return "\n\n".join([overview, *(section(f"## bridle {name}", name) for name in names)])


def page_of_notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """An executed notebook as Markdown, and its pictures by name."""
    parts, pictures = [], {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{len(pictures) + 1}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![What the cell draws]({name})")
            else:
                shown = "".join(output.get("text", data.get("text/plain", "")))
                parts.append(f"``` {{ .text .output }}\n{shown.rstrip()}\n```")
    title, rest = parts[0].split("\n", 1) if "\n" in parts[0] else (parts[0], "")
    files = f"[Notebook]({path.name}) · [source]({path.stem}.py)"
    return "\n\n".join([title, rest, *parts[1:], files]), pictures
