"""Records of every private Megatron symbol this package replaces or calls (see ``megatron_seams``)."""

from __future__ import annotations

from dataclasses import dataclass

CPU = "megatron_disagmoe.cpu"
FIXES = "megatron_disagmoe.upstream_fixes"


@dataclass(frozen=True)
class Seam:
    """One symbol: ``"package.module:name"`` or ``"package.module:Class.name"``.

    ``takes`` names parameters that our use relies on: their loss counts as the symbol's.
    """

    symbol: str
    reason: str
    used_in: str
    test: str
    until: str
    takes: tuple[str, ...] = ()


_CPU = (
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

_FIXES = (
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

TRAINING = "megatron_disagmoe.training"
MODEL = "megatron_disagmoe.model"
_PARITY = "tests/parity/test_parity.py"
_SPLIT = "tests/runtime/test_training.py"
_PASSES_IT = "pretrain() takes it as an argument"

_AF_PIPE = (
    Seam(
        "megatron.training.arguments:add_megatron_arguments",
        "the AF-pipe flags must parse whatever extra_args_provider a script has",
        TRAINING,
        "tests/training/test_bad_input.py",
        "Megatron has entry points for plugins' flags",
        takes=("parser",),
    ),
    Seam(
        "megatron.training.arguments:validate_args",
        "AF-pipe's flags are checked here, and data-parallel sizes follow from the attention side alone",
        TRAINING,
        "tests/training/test_bad_input.py",
        "Megatron has entry points for plugins' flags",
        takes=("args", "defaults"),
    ),
    Seam(
        "megatron.core.parallel_state:initialize_model_parallel",
        "every group of the topology is a Megatron world of its own",
        TRAINING,
        _PARITY,
        "initialize_megatron takes process groups",
        takes=("rank_offset", "local_world_size", "get_embedding_ranks"),
    ),
    Seam(
        "megatron.training.models.gpt:GPTModelConfig.builder",
        "each role builds its own half of the model",
        TRAINING,
        _PARITY,
        "a script can name the builder by a flag",
    ),
    Seam(
        "megatron.training.training:get_forward_backward_func",
        "the step is run by the executor of AF-pipe's schedule",
        TRAINING,
        _PARITY,
        _PASSES_IT,
    ),
    Seam(
        "megatron.training.training:get_megatron_optimizer",
        "gradient norm, found-inf and count of zeros are one over both roles",
        TRAINING,
        _PARITY,
        _PASSES_IT,
    ),
    Seam(
        "megatron.training.training:setup_model_and_optimizer",
        "the table of roles is printed when the model is built",
        TRAINING,
        "tests/training/test_reports.py",
        "pretrain() has a callback after set-up",
    ),
    Seam(
        "megatron.training.training:training_log",
        "a comparison needs losses and gradient norms in full precision",
        "megatron_disagmoe.parity",
        _PARITY,
        "a step callback carries them",
        takes=(
            "loss_dict",
            "learning_rate",
            "iteration",
            "loss_scale",
            "skipped_iter",
            "grad_norm",
            "params_norm",
            "num_zeros_in_grad",
        ),
    ),
    Seam(
        "megatron.training.training:calc_params_l2_norm",
        "the parameters' norm is that of both roles",
        TRAINING,
        _PARITY,
        "it takes a process group",
    ),
    Seam(
        "megatron.core.transformer.moe.moe_logging:MoEMetricsTracker._sync_metrics",
        "router losses are logged for all layers, which are on several attention groups",
        TRAINING,
        _PARITY,
        "the tracker takes the group to sum over",
        takes=("self", "metric_names", "pg_collection"),
    ),
    Seam(
        "megatron.training.training:build_pretraining_data_loader",
        "FFN ranks draw no batch, so their loaders start no processes",
        TRAINING,
        "tests/training/test_loaders.py",
        "the loaders of ranks without data can be left out",
    ),
    Seam(
        "megatron.core.pipeline_parallel.schedules:forward_step_calc_loss",
        "the loss of a micro-batch is Megatron's, scaling included",
        TRAINING,
        _PARITY,
        "it becomes public",
        takes=("model", "output_tensor", "loss_func", "config", "cp_group_size", "is_last_stage"),
    ),
    Seam(
        "megatron.core.tensor_parallel.layers:linear_with_grad_accumulation_and_async_allreduce",
        "a backward in two parts needs weight gradients that can wait",
        TRAINING,
        _SPLIT,
        "local layers honour delay_wgrad_compute",
        takes=("input", "weight", "bias", "gradient_accumulation_fusion", "allreduce_dgrad", "sequence_parallel"),
    ),
    Seam(
        "megatron.core.transformer.moe.router:router_gating_linear",
        "a backward in two parts needs weight gradients that can wait",
        TRAINING,
        _SPLIT,
        "the router honours delay_wgrad_compute",
        takes=("inp", "weight", "bias", "router_dtype"),
    ),
    Seam(
        "megatron.core.transformer.transformer_block:build_module",
        "layers of other groups are built for their random draws only",
        MODEL,
        _PARITY,
        "TransformerBlock takes a layer factory",
    ),
    Seam(
        "megatron.training.initialize:_set_random_seed",
        "vanilla's initial weights are replayed with vanilla's seeds",
        MODEL,
        _PARITY,
        "it becomes public",
        takes=("seed_", "data_parallel_random_init", "te_rng_tracker", "inference_rng_tracker", "ep_group"),
    ),
)

_STAGE = "megatron_disagmoe.model.stages"
_PUBLIC = "it becomes public"
_LAYER = "megatron.core.transformer.transformer_layer:TransformerLayer"
_GPT = "megatron.core.models.gpt.gpt_model:GPTModel"
_MOE = "megatron.core.transformer.moe.moe_layer:MoELayer"
_MPU = "megatron.core.parallel_state"

CALLED = (
    Seam(
        f"{_LAYER}._forward_attention",
        "an attention stage ends before the MoE layer's experts",
        _STAGE,
        _PARITY,
        _PUBLIC,
        takes=("hidden_states", "attention_mask", "rotary_pos_emb"),
    ),
    Seam(
        f"{_LAYER}._forward_pre_mlp_layernorm",
        "likewise: the norm whose output is routed",
        _STAGE,
        _PARITY,
        _PUBLIC,
        takes=("hidden_states",),
    ),
    Seam(
        f"{_GPT}._preprocess",
        "the embedding and the rotary angles, without the layers",
        _STAGE,
        _PARITY,
        _PUBLIC,
        takes=("input_ids", "position_ids", "decoder_input"),
    ),
    Seam(
        f"{_GPT}._postprocess",
        "the output layer and the loss per token, without the layers",
        _STAGE,
        _PARITY,
        _PUBLIC,
        takes=("hidden_states", "labels", "loss_mask"),
    ),
    Seam(f"{_MOE}.route", "the router alone", _STAGE, _PARITY, "never: it is cut to be called"),
    Seam(
        f"{_MOE}.shared_experts_compute", "run while the dispatch travels", _STAGE, _PARITY, "never: likewise"
    ),
    *(
        Seam(
            f"{_MPU}:{name}",
            "FFN ranks count batches as the attention side does",
            "megatron_disagmoe.parallel_state",
            _PARITY,
            "initialize_megatron takes process groups",
        )
        for name in ("_MPU_DATA_PARALLEL_WORLD_SIZE", "_MPU_DATA_PARALLEL_RANK")
    ),
    *(
        Seam(
            f"{_MPU}:{name}",
            "a tied weight has its two ends on two attention groups",
            "megatron_disagmoe.parallel_state",
            _PARITY,
            "initialize_megatron takes process groups",
        )
        for name in ("_EMBEDDING_GROUP", "_EMBEDDING_GLOBAL_RANKS")
    ),
)
"""Used as they are; the model's builder looks all of them up before it builds."""

_RESUMING = "tests/checkpoint/test_resume.py"
_LOADING = "tests/checkpoint/test_loading.py"

_CHECKPOINTS = (
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

_BENCHMARKS = (
    Seam(
        "megatron.training.training:train_step",
        "several runs are timed in turn, step by step",
        "megatron_disagmoe.benchmarks.shaped.gate",
        "tests/benchmarks/test_shaped.py",
        "Megatron calls back before a step",
    ),
    Seam(
        "megatron.core.transformer.moe.moe_layer:MoEAlltoAllTokenDispatcher",
        "the rival that sends one copy per token and rank takes its place in a benchmark",
        "megatron_disagmoe.benchmarks.shaped.one_copy",
        "tests/benchmarks/test_shaped.py",
        "Megatron has such a dispatcher that runs without a GPU",
    ),
)

SEAMS: dict[str, Seam] = {
    seam.symbol: seam for seam in (*_CPU, *_FIXES, *_AF_PIPE, *_CHECKPOINTS, *CALLED, *_BENCHMARKS)
}
