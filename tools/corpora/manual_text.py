r"""Text of a manual page that Pod::Man wrote. Only its few requests are known: others' pages need groff.

.SH "NAME" is a heading; .IP "\fB\-x\fR" 4 an item, `- ` before its text where the tag is a bullet; .Vb 1 ... .Ve is
verbatim text.
"""

import re
import unicodedata

ACCENTS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", "~": "\u0303", ":": "\u0308", ",": "\u0327", "8": ""}
STRINGS = {"L": '"', "R": '"', "-": "-", "A": "'", "C": ""}  # \*(L", \*(R", \*(--, \*(Aq, \*(C` and \*(C'
ESCAPE = re.compile(r"\\(?:\*\((?P<string>..)|\*(?P<accent>.)|\((?P<special>..)|f(?:\(..|.)|s[+-]?\d|(?P<one>.))")
SPECIALS = {pair[:2]: pair[2] for pair in "bu• aq' co© em— en– hy- dq\" ga` ha^ ti~ rs\\".split()}
ONES = {"e": "\\", "-": "-", " ": " ", "'": "'", "`": "`", "\\": "\\", ".": "."}
LETTERS = {"PI": "π", "--": "--", "ss": "ß", "o/": "ø", "O/": "Ø", "ae": "æ", "Ae": "Æ", "d-": "ð", "th": "þ"}


def unescape(text: str) -> str:
    r"""`text` with its escapes resolved; those that only shape it (\fB, \s-1, \&, \|) are dropped."""

    def resolve(found: re.Match) -> str:
        if string := found["string"]:
            return LETTERS.get(string, STRINGS.get(string[0], ""))
        if found["accent"]:
            return ACCENTS.get(found["accent"], "")
        if found["special"]:
            return SPECIALS.get(found["special"], "")
        return ONES.get(found["one"] or "", "")

    return unicodedata.normalize("NFC", ESCAPE.sub(resolve, text))


def manual_text(page: str) -> str:
    """Paragraphs of one line each, apart by blank lines; verbatim text as it is."""
    body = page[page.index("\n.TH ") + 1 :]
    blocks, words, verbatim = [], [], None

    def end_paragraph():
        text = " ".join(words).strip()
        words.clear()
        if text not in ("", "•"):
            blocks.append(text.replace("• ", "- ", 1) if text.startswith("• ") else text)

    for line in body.split("\n"):
        request, _, argument = line.partition(" ")
        if request == ".ie" and argument.startswith("n "):
            request, _, argument = argument[2:].partition(" ")
        if request == ".Ve":
            blocks.append("\n".join(verbatim or []).strip("\n"))
            verbatim = None
        elif verbatim is not None:
            verbatim.append(unescape(line).rstrip())
        elif request == ".Vb":
            end_paragraph()
            verbatim = []
        elif request in (".SH", ".SS", ".IP"):
            end_paragraph()
            tag = re.match(r'"(?:[^"]|"")*"|\S*', argument)[0].removeprefix('"').removesuffix('"')
            tag = unescape(tag.replace('""', '"'))
            words.append(tag)
            if tag != "•":
                end_paragraph()
        elif not line.strip() or request in (".PP", ".Sp"):
            if words != ["•"]:
                end_paragraph()
        elif not line.startswith((".", "'")):
            words.append(unescape(line).strip())
    end_paragraph()
    return "\n\n".join(block for block in blocks if block)
