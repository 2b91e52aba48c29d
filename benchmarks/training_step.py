"""What a training step of MiniLM costs: the rebuilt fake-quant graph beside the float module it came from.

    python benchmarks/training_step.py

32 sentences of STS-B dev, one thread's CPU time of a forward and a backward pass to the weights of all 36 Linears, the
medians of steps in alternation.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import transformers
from protocol import MODELS, alternate, encode, stsb

from qcompiler.graph.linear import linears
from qcompiler.options import Options
from qcompiler.quantize import Request, run_passes
from qcompiler.training import rebuild


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = MODELS / "minilm"
    (feeds,) = encode(folder, stsb("dev", 0)[:32], batch=32)
    options = Options(scheme=arguments.scheme, calibration=[feeds], passes="annotate,insert", progress=False)
    model = run_passes(folder, Request.of(options)).work.model
    rebuilt = rebuild(model)
    for linear in linears(model):
        rebuilt.weights[linear.weight.name or ""].requires_grad_()
    module = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(parameter.ndim == 2 and name.startswith("encoder"))
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}

    def step(parameters: list[torch.nn.Parameter], hidden: torch.Tensor) -> None:
        for parameter in parameters:
            parameter.grad = None
        hidden.square().mean().backward()

    ours, theirs = list(rebuilt.weights.values()), list(module.parameters())
    times = alternate(
        {
            "transformers, float": lambda: step(theirs, module(**tensors).last_hidden_state),
            f"rebuilt, {arguments.scheme}": lambda: step(ours, rebuilt(**tensors)["last_hidden_state"]),
        },
        arguments.rounds,
    )
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    first = next(iter(medians.values()))
    print(f"MiniLM, {len(feeds['input_ids'])} x {feeds['input_ids'].shape[1]} tokens, forward and backward, one thread")
    for name, seconds in medians.items():
        print(f"{name:<24}{seconds:8.3f} s{seconds / first:8.2f} x")


if __name__ == "__main__":
    main()
