import pytest
from esmfold2_trimul_tools.errors import UserError
from esmfold2_trimul_tools.folding.sequences import Record, file_stems, parse_sequence, read_fasta


def test_every_residue_of_the_model_is_accepted():
    letters = "ACDEFGHIKLMNPQRSTVWYX"
    assert parse_sequence(letters) == Record("sequence", letters)


def test_lower_case_and_white_space_are_read_as_plain_residues():
    assert parse_sequence(" mqif\n vk ", "soft") == Record("soft", "MQIFVK")


@pytest.mark.parametrize("letter", ["Z", "B", "U", "*", "-", "1", "é"])
def test_unknown_residue_is_named_with_its_position(letter):
    with pytest.raises(UserError, match=r"unknown residue .* at position 3; the residues are ACD"):
        parse_sequence(f"MQ{letter}I")


@pytest.mark.parametrize("text", ["", " \n "])
def test_empty_sequence_is_refused(text):
    with pytest.raises(UserError, match="sequence: the sequence is empty"):
        parse_sequence(text)


def test_fasta_records_keep_order_names_and_wrapped_lines(tmp_path):
    path = tmp_path / "two.fasta"
    path.write_bytes(b">first a description\r\nMQI\r\nFVK\r\n\r\n>\r\nggg\r\n>sp|P0|X\nX")
    assert read_fasta(path) == [
        Record("first", "MQIFVK"),
        Record("record-2", "GGG"),
        Record("sp|P0|X", "X"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no sequence in this FASTA file"),
        (b"\n \n", "no sequence in this FASTA file"),
        (b"MQIFVK\n", "starts with '>', this one with 'MQIFVK'"),
        (b">a\n>b\nMQ\n", "a: the sequence is empty"),
        (b">a\nMQ\n>b\nMQJ\n", "b: unknown residue 'J' at position 3"),
        (b"\xff\xfe\x00", "not a text file"),
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


def test_file_stems_are_safe_and_no_two_alike():
    names = ["sp|P0CG48|UBC", "../../etc/passwd", "a", "A", "a-2", "α/β", "x" * 300, "x" * 301]
    stems = file_stems(Record(name, "M") for name in names)
    assert stems[:6] == ["sp_P0CG48_UBC", "etc_passwd", "a", "A-2", "a-2-2", "sequence"]
    assert len({stem.lower() for stem in stems}) == len(names)
    assert all(len(stem) <= 90 and "/" not in stem for stem in stems)
