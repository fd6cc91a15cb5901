"""What is replaced so that Megatron runs without a GPU and without compiled libraries."""

from __future__ import annotations

from megatron_disagmoe.seam_records.record import CPU, FIXES, Seam

CPU_STAND_INS = (
    *(
        Seam(
            f"{module}:initialize_megatron",
            "pretrain() calls it without allow_no_cuda, and it demands a GPU",
            CPU,
            "tests/cpu/test_training.py",
            "pretrain() passes allow_no_cuda on",
            takes=("allow_no_cuda",),
        )
        for module in ("megatron.training.initialize", "megatron.training", "megatron.training.training")
    ),
    Seam(
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        "reads a CUDA generator; here the CPU's draws the numbers",
        CPU,
        "tests/cpu/test_stand_ins.py",
        "the tracker works on torch.get_default_device()",
        takes=("device", "clone", "graph_safe"),
    ),
    Seam(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        "writes a CUDA generator; here the CPU's draws the numbers",
        CPU,
        "tests/cpu/test_stand_ins.py",
        "the tracker works on torch.get_default_device()",
        takes=("new_state", "device", "graph_safe"),
    ),
    Seam(
        "megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        "leaves a tensor that is on the CPU already as it is, though NumPy splits were asked for",
        CPU,
        "tests/cpu/test_stand_ins.py",
        "it converts whatever it is given",
        takes=("tensor", "as_numpy", "record_stream"),
    ),
    Seam(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
        "spawns a manager that imports everything again: 3-6 s and 760 MB a rank; forked, 0.7 s",
        CPU,
        "tests/cpu/test_training.py",
        "the start method can be chosen by a flag",
        takes=("mp_mode",),
    ),
)

_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer"
_RESUME = "tests/cpu/test_upstream_fixes.py"

UPSTREAM_FIXES = (
    Seam(
        "megatron.core.datasets.utils:compile_helpers",
        "runs make, which ends the process where the wheel has no Makefile though it ships the built helper",
        FIXES,
        _RESUME,
        "it looks for a built helper first",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE",
        "the three faults below are in the branch for torch's own optimizers",
        FIXES,
        _RESUME,
        "the three are mended upstream",
    ),
    Seam(
        f"{_OPTIMIZER}.state_dict",
        "asserts that every parameter has a step, also when loading before the first one",
        FIXES,
        _RESUME,
        "a fresh distributed optimizer on torch's Adam gives its state_dict",
        takes=("self",),
    ),
    Seam(
        f"{_OPTIMIZER}._set_main_param_and_optimizer_states",
        "expects a step, which most loaders leave out and dp_reshardable's resets; writes to a leaf outside no_grad",
        FIXES,
        _RESUME,
        "a checkpoint loads with torch's Adam",
        takes=("self", "model_param", "tensors"),
    ),
    Seam(
        f"{_OPTIMIZER}.load_state_dict",
        "gives all parameters one step tensor, which then counts once for each of them",
        FIXES,
        _RESUME,
        "a resumed run continues the losses with torch's Adam",
        takes=("self", "state_dict"),
    ),
)
