import bz2
import gzip
import io
import lzma
import sys
from pathlib import Path

import pytest
from esmfold2_trimul_tools.errors import UserError
from esmfold2_trimul_tools.folding.sequences import (
    Failure,
    Record,
    file_stems,
    looks_like_dna,
    parse_sequence,
    read_fasta,
)


def test_every_residue_of_the_model_is_accepted():
    letters = "ACDEFGHIKLMNPQRSTVWYX"
    assert parse_sequence(letters) == Record("sequence", letters)


def test_lower_case_and_white_space_are_read_as_plain_residues():
    assert parse_sequence(" mqif\n vk ", "soft") == Record("soft", "MQIFVK")


@pytest.mark.parametrize("letter", ["Z", "B", "U", "*", "1", "é"])
def test_unknown_residue_is_named_with_its_position(letter):
    with pytest.raises(UserError, match=r"unknown residue .* at position 3; the residues are ACD"):
        parse_sequence(f"MQ{letter}I")


@pytest.mark.parametrize("gap", ["-", ".", "~"])
def test_gaps_of_an_alignment_are_named(gap):
    with pytest.raises(UserError, match=f"one: a gap '{gap}' at position 3, as aligned sequences"):
        parse_sequence(f"MQ{gap}I", "one")


def test_a_stop_codon_at_the_end_is_dropped():
    assert parse_sequence("MQIF*\n").sequence == "MQIF"
    with pytest.raises(UserError, match="unknown residue '\\*' at position 5"):
        parse_sequence("MQIF**")


@pytest.mark.parametrize("residue", ["G", "X", "g*"])
def test_a_single_residue_is_refused(residue):
    with pytest.raises(UserError, match="one: a fold takes at least 2 residues; got '[GX]'"):
        parse_sequence(residue, "one")


@pytest.mark.parametrize("text", ["", " \n ", "*"])
def test_empty_sequence_is_refused(text):
    with pytest.raises(UserError, match="sequence: the sequence is empty"):
        parse_sequence(text)


def test_fasta_records_keep_order_names_and_wrapped_lines(tmp_path):
    path = tmp_path / "two.fasta"
    path.write_bytes(b">first a description\r\nMQI\r\nFVK\r\n\r\n>\r\nggg\r\n>sp|P0|X\nXX")
    assert read_fasta(path) == [
        Record("first", "MQIFVK"),
        Record("record-2", "GGG"),
        Record("sp|P0|X", "XX"),
    ]


TEXT = ">né first\nMQIF\nVK\n>two\nTLTG*\n"
PROTEINS = [Record("né", "MQIFVK"), Record("two", "TLTG")]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"],
)
def test_fasta_in_any_unicode(tmp_path, encoding, ends):
    path = tmp_path / "my.fasta"
    path.write_bytes(TEXT.replace("\n", ends).encode(encoding))
    assert read_fasta(path) == PROTEINS


def test_marks_in_files_that_were_joined(tmp_path):
    path = tmp_path / "joined.fasta"
    path.write_bytes(b"".join(f">{name}\nMQ\n".encode("utf-8-sig") for name in "ab"))
    assert read_fasta(path) == [Record("a", "MQ"), Record("b", "MQ")]


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_packed_fasta(tmp_path, pack, encoding):
    path = tmp_path / "no-ending-tells"
    packed = pack(TEXT.encode(encoding))
    path.write_bytes(packed)
    assert read_fasta(path) == PROTEINS
    for broken in (packed[:-9], packed[:20], packed[:20] + b"\0" * 20 + packed[40:]):
        path.write_bytes(broken)
        with pytest.raises(UserError, match=r"no-ending-tells: not all of a (gzip|bzip2|xz) file"):
            read_fasta(path)


def test_fasta_of_several_packed_parts(tmp_path):
    path = tmp_path / "parts.fasta.gz"
    path.write_bytes(gzip.compress(b">a\nMQ\n") + gzip.compress(b">b\nIF\n"))
    assert [record.name for record in read_fasta(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT.encode("utf-16"), None),
        (gzip.compress(TEXT.encode()), None),
        (b"MQIF\n", "standard input: a FASTA file starts with '>', this one with 'MQIF'"),
        (b"", "standard input: no sequence in this FASTA file"),
    ],
    # gzip's output holds the time: as an id it would differ between test processes.
    ids=["utf-16", "gzip", "no FASTA", "nothing"],
)
def test_fasta_from_standard_input(monkeypatch, content, message):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    if message is None:
        assert read_fasta(Path("-")) == PROTEINS
    else:
        with pytest.raises(UserError, match=message):
            read_fasta(Path("-"))


def test_a_closed_standard_input_holds_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="standard input: no sequence in this FASTA file"):
        read_fasta(Path("-"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no sequence in this FASTA file"),
        (b"\n \n", "no sequence in this FASTA file"),
        (b"MQIFVK\n", "starts with '>', this one with 'MQIFVK'"),
        (b"\xff\xfe\x00", r"not a text file in UTF-8 or UTF-16 \(truncated data at byte 2\)"),
        (b">caf\xe9\nMQ\n", r"not a text file .*\(invalid continuation byte at byte 4\)"),
        (b"PK\x03\x04 and more", "packed with zip; unpack it first"),
        (b"\x28\xb5\x2f\xfd and more", "packed with Zstandard; unpack it first"),
    ],
)
def test_fasta_that_holds_no_proteins_is_refused(tmp_path, content, message):
    path = tmp_path / "bad.fasta"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_fasta(path)


def test_fasta_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"can't be read \(No such file or directory\)"):
        read_fasta(tmp_path / "none.fasta")
    with pytest.raises(UserError, match=r"can't be read \(Is a directory\)"):
        read_fasta(tmp_path)


def test_a_record_that_is_no_protein_leaves_the_others(tmp_path):
    path = tmp_path / "some.fasta"
    path.write_text(">a\n>b\nMQJ\n>c\nMQ:\n>d\nMQ\n")
    message = "b: unknown residue 'J' at position 3; the residues are ACDEFGHIKLMNPQRSTVWY, and X "
    assert read_fasta(path) == [
        Failure("a", "a: the sequence is empty"),
        Failure("b", f"{message}for any other"),
        Failure("c", "c: chain B of 2 is empty"),
        Record("d", "MQ"),
    ]


def test_chains_are_divided_by_colons():
    record = parse_sequence("mqif:\nTL TG*:x", "pair")
    assert record == Record("pair", "MQIF:TLTG:X")
    assert (record.chains, record.length) == (["MQIF", "TLTG", "X"], 9)
    assert Record("one", "MQIF").chains == ["MQIF"]
    assert parse_sequence("G:G").length == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("MQ::IF", "p: chain B of 3 is empty"),
        (":MQ", "p: chain A of 2 is empty"),
        (" : ", "p: the sequence is empty"),
        ("MQ:IFJ", "p: unknown residue 'J' at position 3 of chain B; the residues"),
        ("MQ:I-F", "p: a gap '-' at position 2 of chain B, as aligned"),
        ("ACGU", r"p: RNA, and ESMFold2 folds proteins here; biohub's esm package .*folding\.md"),
        (":".join(["MQ"] * 63), "p: 63 chains; a complex has at most 62"),
    ],
)
def test_complexes_that_are_refused(text, message):
    with pytest.raises(UserError, match=message):
        parse_sequence(text, "p")


@pytest.mark.parametrize(
    ("sequence", "is_dna"),
    [("ACGTACGTACGN", True), ("MQIF:ACGTACGTACGT", True), ("ACGTACGTACG", False),
     ("ACGTACGTACGTM", False)],
)  # fmt: skip
def test_dna_is_told_by_its_letters_and_length(sequence, is_dna):
    assert looks_like_dna(Record("one", sequence)) is is_dna


def test_no_proteins_files_are_anothers():
    names = ["a", "a_rank_2", "a_Summary", "a_summary-2"]
    stems = file_stems(Record(name, "M") for name in names)
    assert stems == ["a", "a_rank_2-2", "a_Summary-2", "a_summary-2-2"]


def test_file_stems_are_safe_and_no_two_alike():
    names = ["sp|P0CG48|UBC", "../../etc/passwd", "a", "A", "a-2", "α/β", "x" * 300, "x" * 301]
    stems = file_stems(Record(name, "M") for name in names)
    assert stems[:6] == ["sp_P0CG48_UBC", "etc_passwd", "a", "A-2", "a-2-2", "sequence"]
    assert len({stem.lower() for stem in stems}) == len(names)
    assert all(len(stem) <= 90 and "/" not in stem for stem in stems)
