"""The files of a fold."""

import json
from pathlib import Path

from .alphafold import confidences, summary_confidences
from .files import write_whole
from .fold import Fold
from .structures import mmcif_of, pdb_of


def write_files(
    result: Fold,
    folder: Path,
    stem: str,
    model_name: str,
    facts: list[list[str]],
    note: str = "",
    page: bool = True,
) -> tuple[dict[str, str], list[str]]:
    """Write what a fold has to say.

    The best sample is STEM.pdb, STEM.cif and so on; the others have their rank after the stem.

    Args:
        model_name: the checkpoint, for the record.
        facts: names and values of settings and timings, for the page.
        note: a remark on the weights.
        page: whether there is to be a page.

    Returns:
        The names of the files by their kinds, and a line on each that could not be made although
        the results are whole.

    Raises:
        OSError: a result can't be written.
    """
    files: dict[str, str] = {}

    def write(kind: str, name: str, content: str) -> None:
        write_whole(folder / name, content)
        files[kind] = name

    remarks = [note] if note else []
    for rank, sample in enumerate(result.ranked, start=1):
        of_rank, kind = (stem, "") if rank == 1 else (f"{stem}_rank_{rank}", f"rank_{rank}_")
        pdb = pdb_of(result, sample, [remark.upper() for remark in remarks])
        write(f"{kind}pdb", f"{of_rank}.pdb", pdb)
        mmcif = mmcif_of(result, sample, model_name, remarks)
        write(f"{kind}mmcif", f"{of_rank}.cif", mmcif)
        summary = json.dumps(summary_confidences(result, sample), indent=1)
        write(f"{kind}summary", f"{of_rank}_summary_confidences.json", summary)
    write("confidences", f"{stem}_confidences.json", confidences(result))

    def draw_picture(path: Path) -> None:
        from .plots import plot_fold

        plot_fold(result, path, note)

    def draw_page(path: Path) -> None:
        from .pages import page_of

        best = (folder / files["mmcif"]).read_text(encoding="utf-8")
        write_whole(path, page_of(result, best, facts, files, note))

    faults = []
    drawn = {"png": (f"{stem}.png", draw_picture), "page": (f"{stem}.html", draw_page)}
    for kind, (name, draw) in drawn.items():
        if kind == "page" and not page:
            continue
        try:
            draw(folder / name)
            files[kind] = name
        except Exception as error:  # whatever a drawing library raises: the fold itself is there
            words = (str(error).strip() or type(error).__name__).splitlines()[0]
            whole = folder / files["pdb"]
            faults.append(f"{folder / name}: can't be drawn ({words}); {whole} is whole")
    return files, faults
