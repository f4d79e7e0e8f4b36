"""The in-tree module of a problem, our layer in its place, and the gradients of either."""

import torch
from fresh_process import ROOT
from helpers import in_tree_module, make_problem, relative_error, seeded
from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
from torch import nn

FLOWS = ("outgoing", "incoming")
MODES = {
    "inference": Mode.INFERENCE,
    "compiled inference": Mode.INFERENCE | Mode.TORCH_COMPILE,
    "training": Mode.TRAINING,
    "compiled training": Mode.TRAINING | Mode.TORCH_COMPILE,
}


def swap_through_kernels(
    model: nn.Module, mode: Mode = Mode.INFERENCE, use_fallback: bool = True
) -> None:
    """Our layer at every site, as the kernels library puts it there."""
    device = next(model.parameters()).device.type
    layer = LocalLayerRepository(repo_path=ROOT, layer_name="ESMFold2TriangleMultiplication")
    mapping = {"EsmFold2TriangleMultiplication": {device: {mode: layer}}}
    with use_kernel_mapping(mapping, inherit_mapping=False):
        kernelize(model, mode=mode, device=device, use_fallback=use_fallback)


def problem_and_module(length: int, channels: int, device: str = "cpu", **others):
    problem = make_problem(length, channels, **others).to(device)
    return problem, in_tree_module(problem)


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return relative_error(got, wanted.detach().cpu().double())


PARAMETERS = [
    f"{part}.{name}"
    for part, names in {
        "norm_start": ("weight", "bias"),
        "norm_mix": ("weight", "bias"),
        "proj_bundle": ("weight",),
        "proj_emit": ("weight",),
        "proj_gate": ("weight",),
    }.items()
    for name in names
]


def gradients(forward, module, problem) -> dict[str, torch.Tensor]:
    """Gradients of x and every parameter, for a fixed random gradient of the output."""
    module.zero_grad()
    x = problem.x.clone().requires_grad_()
    out = forward(x, problem.mask)
    generator = seeded(1)
    out.backward(torch.randn(out.shape, generator=generator).to(out))
    return {"x": x.grad} | {name: value.grad for name, value in module.named_parameters()}
