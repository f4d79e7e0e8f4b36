import gemmi
import pytest
from esmfold2_trimul_tools.folding.structures import mmcif_of, pdb_of
from folding import SHORT, made_up_fold

NAMES = "MET GLN ILE PHE VAL LYS THR LEU THR GLY LYS UNK".split()


def test_pdb_holds_every_residue_with_its_confidence_from_0_to_100(tmp_path):
    result, path = made_up_fold(SHORT.sequence), tmp_path / "short.pdb"
    path.write_text(pdb_of(result, 0, ["A REMARK"]))
    lines = path.read_text().splitlines()
    assert lines[:2] == ["REMARK   1 A REMARK", "REMARK   1 B-FACTOR: PLDDT, 0 TO 100"]
    assert [line[:3] for line in lines[-2:]] == ["TER", "END"]
    atoms = [line for line in lines if line.startswith("ATOM")]
    carbons = [line for line in atoms if line[12:16] == " CA "]
    assert [line[17:20] for line in carbons] == NAMES
    assert [int(line[22:26]) for line in carbons] == list(range(1, 13))
    b_factors = [float(line[60:66]) for line in carbons]
    assert b_factors == pytest.approx((100 * result.plddt[0]).tolist(), abs=0.006)
    for number in (0, 50, len(atoms) - 1):
        written = [float(atoms[number][start : start + 8]) for start in (30, 38, 46)]
        assert written == pytest.approx(result.coords[0, number].tolist(), abs=6e-4)
    assert {line[54:60] for line in atoms} == {"  1.00"}


@pytest.mark.parametrize("sample", [0, 1])
def test_both_formats_hold_the_sample_and_its_chains(tmp_path, sample):
    result = made_up_fold("MQIF:TLTGK:MQIF", samples=2)
    (tmp_path / "it.pdb").write_text(pdb_of(result, sample, []))
    (tmp_path / "it.cif").write_text(mmcif_of(result, sample, "a model", []))
    for name in ("it.pdb", "it.cif"):
        (model,) = gemmi.read_structure(str(tmp_path / name))
        assert [(chain.name, len(chain)) for chain in model] == [("A", 4), ("B", 5), ("C", 4)]
        atoms = [atom for chain in model for residue in chain for atom in residue]
        positions = [position for atom in atoms for position in atom.pos.tolist()]
        assert positions == pytest.approx(result.coords[sample].flatten().tolist(), abs=6e-4)
        assert [model[0][2]["C"][0].b_iso, model["C"][3]["CA"][0].b_iso] == pytest.approx(
            [100 * 2 / 12, 100], abs=0.01
        )


def test_mmcif_has_modelcifs_records_of_quality(tmp_path):
    result = made_up_fold("MQIF:TLTGK:MQIF", samples=2, name="größe/1")
    (tmp_path / "it.cif").write_text(mmcif_of(result, 1, "biohub/ESMFold2", ["it's a remark"]))
    block = gemmi.cif.read(str(tmp_path / "it.cif")).sole_block()

    def table(category, *tags):
        rows = block.find(f"_{category}.", list(tags))
        return [[gemmi.cif.as_string(value) for value in row] for row in rows]

    metrics = table("ma_qa_metric", "id", "type", "mode")
    assert metrics == [
        ["1", "pLDDT", "global"], ["2", "pLDDT", "local"],
        ["3", "pTM", "global"], ["4", "ipTM", "global"],
    ]  # fmt: skip
    values = table("ma_qa_metric_global", "metric_id", "metric_value")
    assert values == [["1", "50.0000"], ["3", "0.8000"], ["4", "0.4000"]]
    local = table("ma_qa_metric_local", "label_asym_id", "label_seq_id", "label_comp_id",
                  "metric_id", "metric_value")  # fmt: skip
    assert len(local) == 13
    assert local[0] == ["A", "1", "MET", "2", "0.00"]
    assert local[5] == ["B", "2", "LEU", "2", "41.67"]
    assert local[12] == ["C", "4", "PHE", "2", "100.00"]
    assert table("ma_model_list", "model_id", "model_name", "model_type_other_details") == [
        ["1", "rank 1", "biohub/ESMFold2"]
    ]
    assert table("struct", "title") == [["gr??e/1; it's a remark"]]
    assert table("entity_poly", "entity_id", "pdbx_strand_id") == [["1", "A,C"], ["2", "B"]]
    assert ["GLY", "peptide linking"] in table("chem_comp", "id", "type")
    assert ["MET", "L-peptide linking"] in table("chem_comp", "id", "type")


def test_a_single_chain_has_no_value_between_chains():
    assert "ipTM" not in mmcif_of(made_up_fold("MQIF"), 0, "a model", [])
