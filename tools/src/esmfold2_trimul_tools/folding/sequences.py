"""Protein sequences from the command line or a FASTA file, checked before any model is loaded.

The twenty standard residues are accepted, and X, which ESMFold2 folds as a residue with backbone
atoms only. Any other letter would be turned into X by the model without a word, so it is refused
here. Lower case (soft-masked FASTA) is accepted and read as upper case; white space is dropped.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError

RESIDUES = "ACDEFGHIKLMNPQRSTVWYX"
_STEM_LENGTH = 80  # characters; leaves room for a suffix within every file system's limit


class Record(NamedTuple):
    """One protein: its name (the first word of a FASTA header) and its residues, upper case."""

    name: str
    sequence: str


def parse_sequence(text: str, name: str = "sequence") -> Record:
    """The protein written in `text`, one letter per residue.

    Raises:
        UserError: nothing in it, or a letter that is no residue (named with its position, from 1).
    """
    sequence = "".join(text.split()).upper()
    if not sequence:
        raise UserError(f"{name}: the sequence is empty")
    for position, letter in enumerate(sequence, start=1):
        if letter not in RESIDUES:
            raise UserError(
                f"{name}: unknown residue {letter!r} at position {position}; "
                f"the residues are {RESIDUES[:-1]}, and X for any other"
            )
    return Record(name, sequence)


def read_fasta(path: Path) -> list[Record]:
    """Every protein of a FASTA file, in its order.

    Raises:
        UserError: the file can't be read, holds no record, or a record is empty or has an unknown
            residue.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file ({error.reason})") from error
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror})") from error

    header, *records = re.split(r"^>", text, flags=re.MULTILINE)
    if header.strip():
        start = header.strip()[:20]
        raise UserError(f"{path}: a FASTA file starts with '>', this one with {start!r}")
    if not records:
        raise UserError(f"{path}: no sequence in this FASTA file")
    parsed = []
    for number, record in enumerate(records, start=1):
        title, _, residues = record.partition("\n")
        name = title.split()[0] if title.split() else f"record-{number}"
        parsed.append(parse_sequence(residues, name))
    return parsed


def file_stems(records: Iterable[Record]) -> list[str]:
    """One file name stem per record: letters, digits, '.', '_' and '-' only, and no two alike.

    Names that differ only in case count as alike, since some file systems think so.
    """
    stems: list[str] = []
    taken: set[str] = set()
    for record in records:
        base = re.sub(r"[^A-Za-z0-9._-]+", "_", record.name).strip("._-")[:_STEM_LENGTH]
        base = base or "sequence"
        stem, count = base, 1
        while stem.lower() in taken:
            count += 1
            stem = f"{base}-{count}"
        taken.add(stem.lower())
        stems.append(stem)
    return stems
