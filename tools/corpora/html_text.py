"""Text of an HTML page: what a reader reads, without navigation; blocks are apart by blank lines, no markup is left."""

import re
from html.parser import HTMLParser

BODY = re.compile(r"<body\b", re.IGNORECASE)
MAIN = re.compile(r"<(?:div|main|section)\b[^>]*\brole=\"main\"", re.IGNORECASE)
WHITE_SPACE = re.compile(r"\s+")
VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}
SKIPPED_TAGS = {"footer", "form", "head", "nav", "noscript", "script", "style", "svg", "template"}
SKIPPED_ROLES = {"contentinfo", "navigation", "search"}
SKIPPED_CLASSES = set("book-navigation headerlink navfooter navheader page-links related sphinxsidebar".split())
SKIPPED_CLASSES |= {"toctree-wrapper", "viewcode-link"}
PARAGRAPHS = set("article aside blockquote center div dl dt figure h1 h2 h3 h4 h5 h6 hr".split())
PARAGRAPHS |= set("main ol p pre section table ul".split())
ITEM, CELL = "- ", " | "
LINES = {"br", "caption", "dd", "figcaption", "li", "tr"}
TIGHT_IN = {"dd", "li"}  # a paragraph in these is a line
CELLS = {"td", "th"}  # a row is a line, whatever is in its cells


class TextExtractor(HTMLParser):
    """Collects from the first element fed to its end. Unclosed elements end with the one around them."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.text: list[str] = []
        self.stack: list[str] = []
        self.skipped_from = 0  # depth of the outermost skipped element, 0 for none
        self.newlines = 0  # wanted before the next word
        self.mark = ""  # of a list item or cell, before the next word
        self.ended = False

    def handle_starttag(self, tag, attributes):
        if self.ended:
            return
        given = dict(attributes)
        if tag not in VOID:
            self.stack.append(tag)
            classes = set((given.get("class") or "").split())
            skip = tag in SKIPPED_TAGS or given.get("role") in SKIPPED_ROLES or classes & SKIPPED_CLASSES
            if skip and not self.skipped_from and len(self.stack) > 1:
                self.skipped_from = len(self.stack)
        self.break_for(tag)
        if tag == "li":
            self.mark = ITEM
        elif tag in CELLS and self.text and not self.newlines:
            self.mark = CELL

    def handle_endtag(self, tag):
        if self.ended or tag not in self.stack:
            return
        while self.stack.pop() != tag:
            pass
        if self.skipped_from > len(self.stack):
            self.skipped_from = 0
        self.break_for(tag)
        self.ended = not self.stack

    def break_for(self, tag):
        if self.skipped_from:
            return
        if tag == "tr" or not CELLS & set(self.stack[-6:]):
            tight = tag != "dt" and bool(TIGHT_IN & set(self.stack[-3:]))
            wanted = 1 if tag in LINES else (1 if tight else 2) if tag in PARAGRAPHS else 0
            self.newlines = max(self.newlines, wanted)
        elif tag in PARAGRAPHS | LINES and not self.mark:
            self.mark = " "

    def handle_data(self, data):
        if self.skipped_from or self.ended:
            return
        verbatim = "pre" in self.stack
        if not verbatim:
            data = WHITE_SPACE.sub(" ", data)
        if not data.strip():
            if self.text and not self.newlines and not self.mark:
                self.text.append(data if verbatim else " ")
            return
        at_line_start = bool(self.newlines) or not self.text
        if at_line_start and self.mark != ITEM:
            self.mark = ""
        if at_line_start or self.mark:
            data = data.lstrip("\n") if verbatim else data.lstrip()
        if self.text:
            self.text.append("\n" * self.newlines)
        self.text.append(self.mark + data)
        self.newlines, self.mark = 0, ""


def html_text(html: str) -> str:
    """Text of the element with role="main", else of the body. No white space at its ends or the ends of its lines."""
    start = MAIN.search(html) or BODY.search(html)
    extractor = TextExtractor()
    extractor.feed(html[start.start() if start else 0 :])
    extractor.close()
    text = re.sub(r"[ \t]+$", "", "".join(extractor.text), flags=re.MULTILINE)
    return re.sub(r" +(?= \| )", "", re.sub(r"\n{3,}", "\n\n", text)).strip()
