"""The passes that a module goes through on its way to machine code."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from qcompiler.targets.tvm.isa import Isa
from qcompiler.targets.tvm.tidy import BUFFERS, SHAPES, Share, TrustConstants


def compile_module(module: Any, isa: Isa) -> Any:
    """The executable.

    TVM's own CPU pipeline, but for Reshape: left as it is, it becomes a view at the end, where the default turns it
    into a copying loop and back, by a recognition that our kernels (which have no blocks to analyse) stop.
    """
    target = isa.target()
    passes = [
        relax.transform.DeadCodeElimination(),
        relax.transform.LegalizeOps(skip_ops=["relax.reshape"]),
        relax.transform.AnnotateTIROpPattern(),
        relax.transform.FuseOps(),
        relax.transform.FuseTIR(),
        relax.transform.ToNonDataflow(),
        relax.transform.RemovePurityChecking(),
        relax.transform.CallTIRRewrite(),
        relax.transform.StaticPlanBlockMemory(),
        relax.transform.LowerAllocTensor(),
        Share(*BUFFERS),
        relax.transform.KillAfterLastUse(),
        relax.transform.LowerRuntimeBuiltin(),
        relax.transform.ComputePrimValue(),
        relax.transform.VMShapeLower(),
        TrustConstants(),
        Share(*SHAPES),
        relax.transform.AttachGlobalSymbol(),
    ]
    with target, tvm.transform.PassContext(opt_level=3):
        return tvm.compile(module, target=target, relax_pipeline=tvm.transform.Sequential(passes))
