"""What the options of bench, tune and conformance mean; lists in bench by commas."""

HELP = {
    "device": "cpu, cuda or cuda:N. Default: a GPU if there is one.",
    "widths": "Channels C of the pair tensor.",
    "lengths": "Residues L. Default: 15 lengths from 64 to 2048 on a GPU, 3 up to 256 on a CPU.",
    "quick": "Fewer lengths.",
    "dtypes": "Of float32, bfloat16 and float16. Default: bfloat16 on a GPU, float32 on a CPU.",
    "directions": "Of outgoing and incoming.",
    "masks": "Of bool, float and none.",
    "passes": "Of forward and training, which is forward and backward.",
    "rival": "Measure this rival, and ours, instead of all; may be repeated.",
    "compile": "Also transformers' module under torch.compile.",
    "max_autotune": "Also transformers' module under torch.compile with max-autotune. Slow.",
    "graphs": "Also CUDA graphs of the rivals, which show device time without host time.",
    "compile_lengths": "The lengths at which anything is compiled by torch.compile. Default: all.",
    "published": "The folder that holds the published package, esmfold2_trimul. Default: the Hub.",
    "budget": "Seconds of timing for each row.",
    "check_up_to": "The longest L that is held to float64 at all pairs; longer at some. "
    "Default: 1024 on a GPU, 512 on a CPU.",
    "first_call": "Also time first calls, in fresh processes with an empty Triton cache.",
    "seed": "Of the random inputs.",
    "busy": "So many processes compute beside the benchmark, as on a machine that people share.",
    "kernel_root": "The kernel repository. Default: the tools' own checkout.",
    "commit": "What to record as the commit. Default: git's answer.",
    "out": "Write the results to this file, after every shape.",
    "resume": "Add to the results in --out what they don't hold yet.",
    "results": "Measure nothing: show the results in this file.",
    "markdown": "Print Markdown tables.",
    "plot": "Draw plots into this folder, as PNG.",
    "json": "Print one JSON document and nothing else.",
}
TUNE_HELP = {
    "out": "Write the settings table to this file.",
    "results": "Write every timing to this file.",
    "stage": "Tune this stage alone: fused_dual_gemm, trimul_einsum, fused_ln_residual; may be "
    "repeated.",
    "width": "Tune this C = D alone; may be repeated. Default: 128 and 256.",
    "kernel_root": HELP["kernel_root"],
    "commit": HELP["commit"],
}
CONFORMANCE_HELP = {
    "device": "cpu, cuda, cuda:N or xpu. Default: a GPU if there is one.",
    "implementation": "Hold this one to the cases instead of all; may be repeated.",
    "case": "Cases whose name has this in it, instead of all; may be repeated.",
    "published": HELP["published"],
    "seed": HELP["seed"],
    "commit": HELP["commit"],
    "out": "Write the results to this file.",
    "results": "Run nothing: show the results in this file.",
    "markdown": "Print the report of docs/conformance.md.",
}
