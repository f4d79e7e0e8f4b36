"""The files of a fold."""

import json
from pathlib import Path

from .alphafold import confidences, summary_confidences
from .files import write_whole
from .fold import Fold
from .structures import write_mmcif, write_pdb


def write_files(
    result: Fold, folder: Path, stem: str, model_name: str, note: str = ""
) -> tuple[dict[str, str], list[str]]:
    """Write what a fold has to say.

    The best sample is STEM.pdb, STEM.cif and so on; the others have their rank after the stem.

    Args:
        model_name: the checkpoint, for the record.
        note: a remark on the weights.

    Returns:
        The names of the files by their kinds, and a line on each that could not be made although
        the results are whole.

    Raises:
        OSError: a result can't be written.
    """
    files: dict[str, str] = {}

    def place(kind: str, name: str) -> Path:
        files[kind] = name
        return folder / name

    remarks = [note] if note else []
    for rank, sample in enumerate(result.ranked, start=1):
        of_rank, kind = (stem, "") if rank == 1 else (f"{stem}_rank_{rank}", f"rank_{rank}_")
        pdb = place(f"{kind}pdb", f"{of_rank}.pdb")
        write_pdb(result, sample, pdb, [remark.upper() for remark in remarks])
        mmcif = place(f"{kind}mmcif", f"{of_rank}.cif")
        write_mmcif(result, sample, mmcif, model_name, remarks)
        summary = json.dumps(summary_confidences(result, sample), indent=1)
        write_whole(place(f"{kind}summary", f"{of_rank}_summary_confidences.json"), summary)
    write_whole(place("confidences", f"{stem}_confidences.json"), confidences(result))

    faults = []
    png = folder / f"{stem}.png"
    try:
        from .plots import plot_fold

        plot_fold(result, png, note)
        files["png"] = png.name
    except Exception as error:  # whatever a drawing library raises: the fold itself is there
        words = (str(error).strip() or type(error).__name__).splitlines()[0]
        faults.append(f"{png}: can't be drawn ({words}); {folder / stem}.pdb is whole")
    return files, faults
