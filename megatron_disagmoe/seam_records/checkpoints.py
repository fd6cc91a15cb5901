"""What AF-pipe replaces where checkpoints are written and read."""

from __future__ import annotations

from megatron_disagmoe.seam_records.record import TRAINING, Seam

_RESUMING = "tests/checkpoint/test_resume.py"
_LOADING = "tests/checkpoint/test_loading.py"

CHECKPOINTS = (
    Seam(
        "megatron.training.checkpointing:get_rng_state",
        "every role has random numbers of its own, and Megatron's key is the first attention group's",
        TRAINING,
        _RESUMING,
        "save_checkpoint takes the key and the replica of the RNG state",
        takes=("ckpt_format", "key_prefix"),
    ),
    Seam(
        "megatron.training.checkpointing:generate_state_dict",
        "rank 0 writes the common part of the optimizer's state for both roles",
        TRAINING,
        _RESUMING,
        "an optimizer without parameters saves its step",
        takes=("args", "model", "optimizer"),
    ),
    Seam(
        "megatron.training.training:load_checkpoint",
        "what does not fit ends the run with the keys, before anything is read and after",
        TRAINING,
        _LOADING,
        "load_checkpoint raises where weights are missing or have no place",
        takes=("ddp_model", "optimizer", "opt_param_scheduler", "load_arg", "checkpointing_context"),
    ),
    Seam(
        "megatron.training.checkpointing:checkpoint_exists",
        "finds the checkpoint that load_checkpoint will load",
        TRAINING,
        _LOADING,
        "load_checkpoint has a callback once it knows",
    ),
    Seam(
        "megatron.training.checkpointing:_load_base_checkpoint",
        "reads the arguments and the kind of optimizer of the run that saved",
        TRAINING,
        _LOADING,
        "load_checkpoint has a callback once it knows",
        takes=("load_dir", "args", "rank0", "checkpointing_context"),
    ),
    Seam(
        "megatron.core.dist_checkpointing:load",
        "what all ranks ask for is compared with what is in the checkpoint",
        TRAINING,
        _LOADING,
        "strictness covers weights alone, and names the keys once",
        takes=("sharded_state_dict", "checkpoint_dir"),
    ),
    Seam(
        "megatron.core.dist_checkpointing.serialization:load_common_state_dict",
        "the optimizer's common state is for one optimizer or for two (dense, experts), as the layout that saved it",
        TRAINING,
        _LOADING,
        "Megatron loads EP=1 state into EP>1 and back",
        takes=("checkpoint_dir",),
    ),
    Seam(
        "megatron.core.dist_checkpointing.state_dict_utils:load_preprocess",
        "says which tensors a state dict asks for once its factories are applied",
        TRAINING,
        _LOADING,
        "it becomes public",
        takes=("sharded_state_dict",),
    ),
)
