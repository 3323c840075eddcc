"""The documentation site: built without a warning, whole, and of what lies in it alone; it shows what GitHub shows."""

import html
import inspect
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

from helpers.site import ROOT, build_site
from markdown_it import MarkdownIt

import bridle_hf
from bridle_hf.commands import COMMANDS


# Where the site has a page of the checkout.
PAGES = {
    "README.md": "index.html",
    "training/README.md": "guide.html",
    "model_cards/README.md": "model_cards.html",
    "model_cards/released/bridle-audio-small/README.md": "released/bridle-audio-small.html",
    "model_cards/released/bridle-image-small/README.md": "released/bridle-image-small.html",
    "CONTRIBUTING.md": "contributing.html",
    "CHANGELOG.md": "changes.html",
    **{f"docs/{path.name}": f"{path.stem}.html" for path in sorted((ROOT / "docs").glob("*.md"))},
}
# Elements that Markdown writes otherwise in one dialect than in another, where something is wrong.
COUNTED = ("h1", "h2", "h3", "li", "table", "tr", "td", "img", "strong", "em")


class Content(HTMLParser):
    """How many elements of a kind the article of a page has, and what it loads and links to."""

    def __init__(self, page: str):
        super().__init__()
        self.counts, self.loaded, self.links, self.ids, self.depth = Counter(), [], [], set(), 0
        self.feed(re.sub(r"<tr>\s*(<td></td>\s*)+</tr>", "", page))  # of a table that waits for its first row

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        self.depth += tag == "article"
        if self.depth:
            self.counts[tag] += 1
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        for name in ("src", "srcset", "data", "action") if tag != "a" else ():
            self.loaded += [attributes[name]] if name in attributes else []
        if tag == "link" and attributes.get("rel") not in ("canonical", "next", "prev"):
            self.loaded.append(attributes["href"])

    def handle_endtag(self, tag):
        self.depth -= tag == "article"


def test_the_site(tmp_path):
    """One build for all that is asked of it."""
    site = tmp_path / "site"
    build_site(site)
    pages = {path: Content(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    check_addresses(site, pages)
    check_markdown(site, pages)
    check_reference(site)
    check_commands(site)


def check_addresses(site: Path, pages: dict[Path, Content]) -> None:
    """Nothing is loaded from elsewhere, and links lead somewhere."""
    for path, page in pages.items():
        for address in page.loaded:
            assert not re.match(r"(\w+:)?//", address), f"{path.name} loads {address}"
        for link in page.links if path.name != "404.html" else ():
            if re.match(r"\w+:", link):
                continue
            file, _, anchor = link.partition("#")
            target = (path.parent / file).resolve() if file else path
            target = target / "index.html" if target.is_dir() else target
            assert target.exists(), f"{path.name}: {link}"
            if anchor and target.suffix == ".html":
                assert anchor in pages[target].ids, f"{path.name}: {link}"
    for style in site.rglob("*.css"):
        for address in re.findall(r"url\((?!data:)[\"']?([^)\"']+)", style.read_text(encoding="utf-8")):
            assert not re.match(r"(\w+:)?//", address), f"{style.name} loads {address}"


def check_markdown(site: Path, pages: dict[Path, Content]) -> None:
    """Lists, tables and the like are those that GitHub shows."""
    different = {}
    for source, place in PAGES.items():
        text = re.sub(r"\A---\n.*?\n---\n", "", (ROOT / source).read_text(encoding="utf-8"), flags=re.DOTALL)
        theirs = MarkdownIt("commonmark").enable("table").render(text)
        expected, found = Content(f"<article>{theirs}</article>").counts, pages[site / place].counts
        different |= {(source, tag): (expected[tag], found[tag]) for tag in COUNTED if expected[tag] != found[tag]}
    assert not different, "elements on GitHub, and on the site"


def check_reference(site: Path) -> None:
    """It has all public names, and nothing in it was not understood."""
    shown = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    missing = [name for name in bridle_hf.__all__ if f'id="bridle_hf.{name}"' not in shown]
    assert not missing
    text = re.sub(r"<[^>]+>", "", shown)
    # A section that is not known as one, and marks that were not read.
    assert not re.findall(r".*(?:Args\b|\*optional\*|`).*", text)


def check_commands(site: Path) -> None:
    """All are told."""
    text = html.unescape(re.sub(r"<[^>]+>", "", (site / "commands.html").read_text(encoding="utf-8")))
    for name, command in COMMANDS.items():
        assert " ".join(f"usage: bridle {name} {command.usage}".split()) in text


def test_docstrings_describe_arguments_that_there_are():
    """Of what the reference shows: each name under `Args:` is a parameter, or a field of the class."""
    for name in bridle_hf.__all__:
        described = getattr(bridle_hf, name)
        functions = [described]
        if inspect.isclass(described):
            members = vars(described).items()
            functions += [member for key, member in members if inspect.isfunction(member) and key[0] != "_"]
        for function in functions:
            known = {*inspect.signature(function).parameters, *dir(function)}
            for line in described_arguments(inspect.cleandoc(function.__doc__ or "")):
                assert set(line) <= known, f"{name}, {function.__name__}: {line}"


def described_arguments(docstring: str) -> list[list[str]]:
    """The names that each entry of `Args:` begins with."""
    section = re.search(r"^Args:\n((?: +.*\n?|\n)+)", docstring, re.MULTILINE)
    entries = re.findall(r"^ {4}(\w[\w, *]*?)(?: \(.*)?:", section[1], re.MULTILINE) if section else []
    return [re.split(r", ", entry) for entry in entries]
