"""A sample of a fold as a structure, in PDB and mmCIF files.

The mmCIF file has ModelCIF's records of quality (`_ma_qa_metric` with global and local values), by
which viewers know a predicted model and colour it by pLDDT.
"""

import gemmi

from .fold import Fold
from .sequences import CHAIN_NAMES, Record

_MODEL = "1"


def structure_of(result: Fold, sample: int) -> gemmi.Structure:
    """The structure of a sample; its B-factors are pLDDT from 0 to 100."""
    from transformers.models.esmfold2.protein_utils import PROTEIN_1TO3, PROTEIN_HEAVY_ATOMS

    record = result.record
    plddt = iter((100 * result.plddt[sample]).tolist())
    positions = iter(result.coords[sample].tolist())
    structure, model = gemmi.Structure(), gemmi.Model(1)
    structure.name = record.name.encode("ascii", "replace").decode()  # neither format has others
    structure.entities = gemmi.EntityList(_entities(record))
    serial = 0
    for name, sequence in zip(CHAIN_NAMES, record.chains, strict=False):
        chain = gemmi.Chain(name)
        for number, letter in enumerate(sequence, start=1):
            residue = gemmi.Residue()
            residue.name = PROTEIN_1TO3[letter]
            residue.seqid = gemmi.SeqId(number, " ")
            residue.label_seq, residue.subchain = number, name
            residue.entity_type = gemmi.EntityType.Polymer
            confidence = next(plddt)
            for atom_name in PROTEIN_HEAVY_ATOMS[residue.name]:
                serial += 1
                atom = gemmi.Atom()
                atom.name, atom.element = atom_name, gemmi.Element(atom_name[0])
                atom.pos, atom.serial = gemmi.Position(*next(positions)), serial
                atom.b_iso = confidence
                residue.add_atom(atom)
            chain.add_residue(residue)
        model.add_chain(chain)
    structure.add_model(model)
    return structure


def pdb_of(result: Fold, sample: int, remarks: list[str]) -> str:
    """A sample as a PDB file."""
    structure = structure_of(result, sample)
    structure.raw_remarks = [
        f"REMARK   1 {remark}" for remark in (*remarks, "B-FACTOR: PLDDT, 0 TO 100")
    ]
    options = gemmi.PdbWriteOptions()
    options.cryst1_record = False
    return structure.make_pdb_string(options)


def mmcif_of(result: Fold, sample: int, model_name: str, remarks: list[str]) -> str:
    """A sample as an mmCIF file with ModelCIF's records of quality."""
    structure = structure_of(result, sample)
    groups = gemmi.MmcifOutputGroups(False)
    for group in ("atoms", "block_name", "chem_comp", "entity", "entity_poly",
                  "entity_poly_seq", "entry", "struct_asym"):  # fmt: skip
        setattr(groups, group, True)
    document = structure.make_mmcif_document(groups)
    block = document.sole_block()
    for residue in block.find("_chem_comp.", ["id", "type"]):
        linking = "peptide linking" if residue[0] == "GLY" else "L-peptide linking"
        residue[1] = gemmi.cif.quote(linking)
    _add_quality(block, structure, result, sample, model_name, remarks)
    return document.as_string()


def _entities(record: Record) -> list[gemmi.Entity]:
    """One for each different sequence, with the chains that have it."""
    from transformers.models.esmfold2.protein_utils import PROTEIN_1TO3

    entities = []
    for number, sequence in enumerate(dict.fromkeys(record.chains), start=1):
        entity = gemmi.Entity(str(number))
        entity.entity_type = gemmi.EntityType.Polymer
        entity.polymer_type = gemmi.PolymerType.PeptideL
        entity.full_sequence = [PROTEIN_1TO3[letter] for letter in sequence]
        entity.subchains = [
            name
            for name, chain in zip(CHAIN_NAMES, record.chains, strict=False)
            if chain == sequence
        ]
        entities.append(entity)
    return entities


def _add_quality(
    block: gemmi.cif.Block,
    structure: gemmi.Structure,
    result: Fold,
    sample: int,
    model_name: str,
    remarks: list[str],
) -> None:
    def loop(category: str, tags: str, rows: list[list[str]]) -> None:
        table = block.init_loop(f"_{category}.", tags.split())
        for row in rows:
            table.add_row([gemmi.cif.quote(value) for value in row])

    name = structure.name
    loop("struct", "entry_id title", [[name, "; ".join([name, *remarks])]])
    loop(
        "ma_model_list",
        "ordinal_id model_id model_group_id model_name data_id model_type model_type_other_details",
        [["1", _MODEL, "1", f"rank {result.ranked.index(sample) + 1}", "1",
          "Ab initio model", model_name]],
    )  # fmt: skip
    loop("ma_data", "id name content_type", [["1", name, "model coordinates"]])
    loop("software", "pdbx_ordinal name classification", [["1", "ESMFold2", "model building"]])
    metrics = [
        ["1", "pLDDT", "pLDDT", "global", "Mean over the residues, 0 to 100"],
        ["2", "pLDDT", "pLDDT", "local", "Confidence of a residue, 0 to 100"],
        ["3", "pTM", "pTM", "global", "Predicted TM-score, 0 to 1"],
    ]
    globals_ = [["1", float(100 * result.plddt[sample].mean())], ["3", float(result.ptm[sample])]]
    if result.several:
        metrics.append(["4", "ipTM", "ipTM", "global", "Predicted TM-score between chains, 0 to 1"])
        globals_.append(["4", float(result.iptm[sample])])
    loop("ma_qa_metric", "id name type mode description", metrics)
    loop(
        "ma_qa_metric_global",
        "ordinal_id model_id metric_id metric_value",
        [[str(n), _MODEL, metric, f"{value:.4f}"] for n, (metric, value) in enumerate(globals_, 1)],
    )
    residues = [
        [chain.name, str(residue.label_seq), residue.name, f"{residue[0].b_iso:.2f}"]
        for chain in structure[0]
        for residue in chain
    ]
    loop(
        "ma_qa_metric_local",
        "ordinal_id model_id label_asym_id label_seq_id label_comp_id metric_id metric_value",
        [[str(n), _MODEL, chain, number, residue, "2", value]
         for n, (chain, number, residue, value) in enumerate(residues, 1)],
    )  # fmt: skip
