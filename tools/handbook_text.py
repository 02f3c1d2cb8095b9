#!/usr/bin/env python3
"""Turns the HTML pages of the Debian Administrator's Handbook into one plain text file, in reading order.

Pages are followed from index.html by their links to the next one. Navigation and tables of contents are left out; white space is collapsed
except in listings; paragraphs are parted by an empty line.
"""
import sys

sys.path.pop(0)  # this folder: its tokenize.py must not stand in for the standard library's

import argparse
import os
import secrets
from html.parser import HTMLParser
from pathlib import Path

SKIPPED_TAGS = {"head", "script", "style"}
SKIPPED_CLASSES = {"docnav", "toc"}
SKIPPED_IDS = {"banner", "title"}  # the site's head on every page
BLOCK_TAGS = {"div", "p", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "dl", "dt", "dd", "table", "tr", "pre", "blockquote", "hr"}
VOID_TAGS = {"br", "col", "hr", "img", "input", "link", "meta"}


class Failure(Exception):
    """What went wrong, in one line with its mend."""


class Page(HTMLParser):
    """Collects a page's paragraphs, and the name of the page that follows it."""

    def __init__(self):
        super().__init__()
        self.paragraphs, self.following = [], None
        self.pieces = []  # text of the paragraph being read
        self.skipped = self.listing = 0  # depth inside what is skipped, inside <pre>

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "link" and attributes.get("rel") == "next":
            self.following = attributes.get("href", "").split("#")[0]
        if tag in VOID_TAGS:
            if tag in ("br", "hr"):
                self.handle_data("\n" if self.listing else " ")
        elif self.skipped or self.is_skipped(tag, attributes):
            self.skipped += 1
        else:
            if tag in BLOCK_TAGS:
                self.end_paragraph()
            if tag in ("td", "th"):
                self.pieces.append(" ")
            self.listing += tag == "pre"

    def handle_endtag(self, tag):
        if tag in VOID_TAGS:
            return
        if self.skipped:
            self.skipped -= 1
            return
        if tag in BLOCK_TAGS:
            self.end_paragraph()
        self.listing -= tag == "pre"

    def handle_data(self, data):
        if not self.skipped:
            self.pieces.append(data)

    @staticmethod
    def is_skipped(tag, attributes):
        classes = (attributes.get("class") or "").split()
        return tag in SKIPPED_TAGS or not SKIPPED_CLASSES.isdisjoint(classes) or attributes.get("id") in SKIPPED_IDS

    def end_paragraph(self):
        text = "".join(self.pieces)
        self.pieces = []
        if self.listing:
            text = "\n".join(line.rstrip() for line in text.strip("\n").split("\n"))
        else:
            text = " ".join(text.split())
        if text.strip():
            self.paragraphs.append(text)


def read_pages(folder):
    """The paragraphs of all pages."""
    paragraphs, seen, name = [], set(), "index.html"
    while name and name not in seen:
        seen.add(name)
        page = Page()
        page.feed((folder / name).read_text(encoding="utf-8"))
        page.close()
        page.end_paragraph()
        paragraphs += page.paragraphs
        name = page.following
    return paragraphs


def main():
    parser = argparse.ArgumentParser(description="Turn the pages of the Debian Administrator's Handbook into one text.")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="text to write")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="pages in one language: the folder with index.html")
    arguments = parser.parse_args()
    output = arguments.output
    temporary = output.with_name(f".{output.name}.{secrets.token_hex(8)}.part")
    try:
        paragraphs = read_pages(arguments.folder)
        if not paragraphs:
            raise Failure(f"{arguments.folder / 'index.html'}: no text found; name the folder with the handbook's pages")
        try:
            temporary.touch(exist_ok=False)
            temporary.write_text("\n\n".join(paragraphs) + "\n", encoding="utf-8")
            os.replace(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)
        return 0
    except Failure as failure:
        print(f"handbook_text.py: {failure}", file=sys.stderr)
    except OSError as error:
        path, reason = error.filename or output, error.strerror or error
        print(f"handbook_text.py: {path}: {reason}; check the path and its permissions", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
