"""Protein sequences from the command line or a FASTA file, checked before any model is loaded.

The twenty standard residues are accepted, and X, which ESMFold2 folds as a residue with backbone
atoms only. Any other letter would be turned into X by the model without a word, so it is refused
here. Lower case (soft-masked FASTA) is accepted and read as upper case; white space is dropped, and
so is a `*` at the end of a chain, the stop codon of a translated gene. A `:` ends a chain of a
complex and begins the next.
"""

import bz2
import gzip
import json
import lzma
import re
import string
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError

STDIN = Path("-")
RESIDUES = "ACDEFGHIKLMNPQRSTVWYX"
# Residues; of a single one transformers' language-model encoder squeezes the axis away.
SHORTEST = 2
CHAIN_NAMES = string.ascii_uppercase + string.ascii_lowercase + string.digits  # as in PDB files
ELSEWHERE = "biohub's esm package folds it (docs/folding.md)"
_DNA_LENGTH = 12  # residues; a shorter peptide may be of A, C, G, N and T alone
_GAPS = "-.~"  # of aligned FASTA, A2M and MSF
# What a compressed file starts with: its format, and what unpacks it where Python can.
_PACKED = (
    (b"\x1f\x8b", "gzip", gzip.decompress),
    (b"BZh", "bzip2", bz2.decompress),
    (b"\xfd7zXZ\0", "xz", lzma.decompress),
    (b"\x28\xb5\x2f\xfd", "Zstandard", None),
    (b"PK\x03\x04", "zip", None),
)
# Endings of a stem with which the files of one protein could be another's.
_TAKEN_ENDINGS = re.compile(r"_(summary|rank_\d+)$", re.IGNORECASE)
_STEM_LENGTH = 80  # characters; leaves room for a suffix within every file system's limit


class Record(NamedTuple):
    """A protein, or a complex of several chains.

    name: the first word of a FASTA header. sequence: residues in upper case, with ":" between
    chains.
    """

    name: str
    sequence: str

    @property
    def chains(self) -> list[str]:
        """The residues of each chain."""
        return self.sequence.split(":")

    @property
    def length(self) -> int:
        """Residues of all chains."""
        return sum(map(len, self.chains))


class Failure(NamedTuple):
    """A protein that was not folded: why, in a line, and the exit status if nothing else folds.

    trace: of an error that nobody foresaw, in words: a traceback would keep the fold's tensors.
    """

    name: str
    message: str
    exit_status: int = 2
    trace: str = ""

    def summary(self) -> dict[str, Any]:
        """What the JSON output says of the protein."""
        return {"name": self.name, "error": self.message}


def parse_sequence(text: str, name: str = "sequence") -> Record:
    """The protein written in `text`, one letter per residue, or the complex with ":" in between.

    Raises:
        UserError: nothing in it, a single residue, more chains than names for them, or a letter
            that is no residue (named with its position, from 1).
    """
    texts = "".join(text.split()).upper().split(":")
    chains = [chain.removesuffix("*") for chain in texts]
    if not any(chains):
        raise UserError(f"{name}: the sequence is empty")
    if len(chains) > len(CHAIN_NAMES):
        raise UserError(f"{name}: {len(chains)} chains; a complex has at most {len(CHAIN_NAMES)}")
    for chain_name, chain in zip(CHAIN_NAMES, chains, strict=False):
        of_chain = f" of chain {chain_name}" if len(chains) > 1 else ""
        if not chain:
            raise UserError(f"{name}: chain {chain_name} of {len(chains)} is empty")
        _check_residues(chain, name, of_chain)
    record = Record(name, ":".join(chains))
    if record.length < SHORTEST:
        raise UserError(f"{name}: a fold takes at least {SHORTEST} residues; got {chains[0]!r}")
    return record


def _check_residues(chain: str, name: str, of_chain: str) -> None:
    if "U" in chain and set(chain) <= set("ACGUN"):
        raise UserError(f"{name}: RNA{of_chain}, and ESMFold2 folds proteins here; {ELSEWHERE}")
    for position, letter in enumerate(chain, start=1):
        if letter in _GAPS:
            raise UserError(
                f"{name}: a gap {letter!r} at position {position}{of_chain}, as aligned sequences "
                "have them; take the gaps out"
            )
        if letter not in RESIDUES:
            raise UserError(
                f"{name}: unknown residue {letter!r} at position {position}{of_chain}; "
                f"the residues are {RESIDUES[:-1]}, and X for any other"
            )


def looks_like_dna(record: Record) -> bool:
    """Whether a chain has no other letters than DNA's, which are residues too."""
    return any(len(chain) >= _DNA_LENGTH and set(chain) <= set("ACGTN") for chain in record.chains)


def read_fasta(path: Path) -> list[Record | Failure]:
    """Every protein of a FASTA file, in its order; "-" is standard input.

    The text is UTF-8, UTF-16 or UTF-32, with a mark or without, and may be packed with gzip, bzip2
    or xz. A protein that `parse_sequence` refuses is a Failure.

    Raises:
        UserError: the file can't be read or holds no record.
    """
    source = "standard input" if path == STDIN else str(path)
    try:
        content = _standard_input() if path == STDIN else path.read_bytes()
    except OSError as error:
        raise UserError(f"{source}: can't be read ({error.strerror})") from error
    text = _text(content, source)

    header, *records = re.split(r"^>", text, flags=re.MULTILINE)
    if header.strip():
        start = header.strip()[:20]
        raise UserError(f"{source}: a FASTA file starts with '>', this one with {start!r}")
    if not records:
        raise UserError(f"{source}: no sequence in this FASTA file")
    parsed: list[Record | Failure] = []
    for number, record in enumerate(records, start=1):
        title, _, residues = record.partition("\n")
        name = title.split()[0] if title.split() else f"record-{number}"
        try:
            parsed.append(parse_sequence(residues, name))
        except UserError as error:
            parsed.append(Failure(name, str(error)))
    return parsed


def _standard_input() -> bytes:
    return b"" if sys.stdin is None else sys.stdin.buffer.read()  # None where it is closed


def _text(content: bytes, source: str) -> str:
    """The text of a file, unpacked and decoded, its lines ended by newlines alone."""
    for start, name, unpack in _PACKED:
        if content.startswith(start):
            if unpack is None:
                raise UserError(f"{source}: packed with {name}; unpack it first")
            try:
                content = unpack(content)
            except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
                raise UserError(f"{source}: not all of a {name} file ({error})") from error
            break
    try:
        # What JSON's readers do: a mark tells, else where the first characters have zero bytes.
        text = content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{source}: not a text file in UTF-8 or UTF-16 ({error.reason} at byte {error.start})"
        ) from error
    # Files that were joined have marks in the middle.
    return re.sub(r"\r\n?", "\n", text.replace("\ufeff", ""))


def file_stems(records: Iterable[Record | Failure]) -> list[str]:
    """One file name stem per record: letters, digits, '.', '_' and '-' only, and no two alike.

    Names that differ only in case count as alike, since some file systems think so.
    """
    stems: list[str] = []
    taken: set[str] = set()
    for record in records:
        base = re.sub(r"[^A-Za-z0-9._-]+", "_", record.name).strip("._-")[:_STEM_LENGTH]
        base = base or "sequence"
        stem, count = base, 1
        while stem.lower() in taken or _TAKEN_ENDINGS.search(stem):
            count += 1
            stem = f"{base}-{count}"
        taken.add(stem.lower())
        stems.append(stem)
    return stems
