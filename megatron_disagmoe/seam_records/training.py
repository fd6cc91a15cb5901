"""What AF-pipe replaces in Megatron's training, and what the benchmarks replace."""

from __future__ import annotations

from megatron_disagmoe.seam_records.record import MODEL, PARITY, TRAINING, Seam

_SPLIT = "tests/runtime/test_training.py"
_PASSES_IT = "pretrain() takes it as an argument"

AF_PIPE = (
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
        PARITY,
        "initialize_megatron takes process groups",
        takes=("rank_offset", "local_world_size", "get_embedding_ranks"),
    ),
    Seam(
        "megatron.training.models.gpt:GPTModelConfig.builder",
        "each role builds its own half of the model",
        TRAINING,
        PARITY,
        "a script can name the builder by a flag",
    ),
    Seam(
        "megatron.training.training:get_forward_backward_func",
        "the step is run by the executor of AF-pipe's schedule",
        TRAINING,
        PARITY,
        _PASSES_IT,
    ),
    Seam(
        "megatron.training.training:get_megatron_optimizer",
        "gradient norm, found-inf and count of zeros are one over both roles",
        TRAINING,
        PARITY,
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
        PARITY,
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
        PARITY,
        "it takes a process group",
    ),
    Seam(
        "megatron.core.transformer.moe.moe_logging:MoEMetricsTracker._sync_metrics",
        "router losses are logged for all layers, which are on several attention groups",
        TRAINING,
        PARITY,
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
        PARITY,
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
        PARITY,
        "TransformerBlock takes a layer factory",
    ),
    Seam(
        "megatron.training.initialize:_set_random_seed",
        "vanilla's initial weights are replayed with vanilla's seeds",
        MODEL,
        PARITY,
        "it becomes public",
        takes=("seed_", "data_parallel_random_init", "te_rng_tracker", "inference_rng_tracker", "ep_group"),
    ),
)

BENCHMARKS = (
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
