"""Checks every relative link and anchor in the repository's Markdown files, without a network.

A link must name a file or folder of the repository, as spelt there; an anchor must be a heading of
the file it points to, spelt as GitHub spells it. Links with a scheme (https:, mailto:) are
left alone.
"""

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]

# Fenced blocks and code spans hold no links; blanked, so that line numbers stay.
_FENCE = re.compile(r"^ {0,3}(```+|~~~+).*?(?:^ {0,3}\1|\Z)", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)
_LINKS = (
    re.compile(r"\]\(\s*<?([^\s)>]+)"),  # [text](target "title"), ![alt](target)
    re.compile(r"^ {0,3}\[[^\]^]+\]:\s*<?([^\s>]+)", re.MULTILINE),  # [name]: target
    re.compile(r"""<(?:a|img|source)\b[^>]*?\b(?:href|src|srcset)=["']([^"'\s]+)"""),
)
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:|//")
_HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.+?)(?:[ \t]+#+)?[ \t]*$", re.MULTILINE)
_ANCHOR = re.compile(r"""<[a-z]+\b[^>]*?\b(?:id|name)=["']([^"']+)["']""")


def markdown_files() -> list[Path]:
    """The Markdown files that git tracks or would track."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "*.md"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def without_code(text: str) -> str:
    """The text with code blanked, line breaks kept."""
    for code in (_FENCE, _SPAN):
        text = code.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text)
    return text


def anchors(text: str) -> set[str]:
    """The anchors of a Markdown file: its headings as GitHub spells them, and explicit ids."""
    seen: Counter[str] = Counter()
    found = set(_ANCHOR.findall(without_code(text)))
    for heading in _HEADING.findall(_FENCE.sub("", text)):
        shown = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)  # a link shows its text
        slug = re.sub(r"[^\w\- ]", "", shown.replace("`", "").lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def links(text: str) -> Iterator[tuple[int, str]]:
    """Line number and target of every link."""
    text = without_code(text)
    for kind in _LINKS:
        for found in kind.finditer(text):
            yield text.count("\n", 0, found.start(1)) + 1, found[1]


def fault(page: Path, target: str) -> str | None:
    """What is wrong with a link, or None."""
    if _SCHEME.match(target):
        return None
    name, _, anchor = unquote(target).partition("#")
    path = (page.parent / name).resolve() if name else page
    if not path.is_relative_to(ROOT):
        return "leads out of the repository"
    if not path.exists():
        return "no such file"
    if anchor and path.suffix == ".md" and anchor not in anchors(path.read_text("utf-8")):
        return f"no heading #{anchor} there"
    return None


def main() -> int:
    """Prints each broken link as file:line and returns 1 if there is any."""
    pages = markdown_files()
    checked = broken = 0
    for page in pages:
        for line, target in sorted(links(page.read_text("utf-8"))):
            checked += 1
            if wrong := fault(page, target):
                broken += 1
                print(f"{page.relative_to(ROOT)}:{line}: {target}: {wrong}")
    print(f"{checked} links in {len(pages)} Markdown files, {broken} broken")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
