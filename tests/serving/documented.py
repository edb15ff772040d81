"""Options and words that the runtimes document, to hold commands and files against."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


TGI = _words(
    """
    --model-id --revision --validation-workers --sharded --num-shard --quantize --speculate --dtype
    --kv-cache-dtype --trust-remote-code --max-concurrent-requests --max-best-of
    --max-stop-sequences --max-top-n-tokens --max-input-tokens --max-input-length --max-total-tokens
    --waiting-served-ratio --max-batch-prefill-tokens --max-batch-total-tokens --max-waiting-tokens
    --max-batch-size --cuda-graphs --hostname --port --prometheus-port --shard-uds-path
    --master-addr --master-port --huggingface-hub-cache --weights-cache-override
    --disable-custom-kernels --cuda-memory-fraction --rope-scaling --rope-factor --json-output
    --otlp-endpoint --otlp-service-name --cors-allow-origin --api-key --watermark-gamma
    --watermark-delta --ngrok --ngrok-authtoken --ngrok-edge --tokenizer-config-path
    --disable-grammar-support --env --max-client-batch-size --lora-adapters --usage-stats
    --payload-limit --enable-prefill-logprobs --graceful-termination-timeout
    """
)
"""docs/source/reference/launcher.md of huggingface/text-generation-inference at db931fcf."""

TGI_VALUES = {
    "--kv-cache-dtype": {"fp8_e4m3fn", "fp8_e5m2"},
    "--usage-stats": {"on", "off", "no-stack"},
}
"""The values that the same page allows."""

TENSORRT_LLM = _words(
    """
    --tokenizer --custom_tokenizer --host --port --backend --custom_module_dirs --log_level
    --max_beam_width --max_batch_size --max_num_tokens --max_seq_len --tensor_parallel_size
    --tp_size --pipeline_parallel_size --pp_size --context_parallel_size --cp_size
    --moe_expert_parallel_size --ep_size --moe_cluster_parallel_size --cluster_size --gpus_per_node
    --free_gpu_memory_fraction --kv_cache_free_gpu_memory_fraction --num_postprocess_workers
    --trust_remote_code --revision --config --extra_llm_api_options --reasoning_parser --tool_parser
    --metadata_server_config_file --server_role --otlp_traces_endpoint --enable_chunked_prefill
    --chat_template
    """
)
"""tensorrt_llm/commands/serve.py of NVIDIA/TensorRT-LLM at 00209af1."""

LLAMA_CPP = _words(
    """
    -m -c -np -ngl -ctk -ctv -a --host --port -t -b -ub -fa -hf --api-key --metrics
    """
)
"""Some of tools/server/README.md of ggml-org/llama.cpp at 00dc8057."""

LLAMA_CPP_CACHES = _words(
    """
    f32 f16 bf16 q8_0 q4_0 q4_1 iq4_nl q5_0 q5_1
    """
)
"""Its values of -ctk and -ctv."""

MODELFILE = _words(
    """
    from parameter template system adapter license message requires draft renderer parser
    """
)
"""Instructions of docs/modelfile.mdx and parser/parser.go of ollama/ollama at fb307609."""

MODELFILE_PARAMETERS = _words(
    """
    num_ctx repeat_last_n repeat_penalty temperature seed stop num_predict draft_num_predict top_k
    top_p min_p num_keep typical_p presence_penalty frequency_penalty num_batch num_gpu main_gpu
    use_mmap num_thread
    """
)
"""Of the same page, and the fields of Options in its api/types.go."""

OLLAMA_VARIABLES = _words(
    """
    OLLAMA_HOST OLLAMA_NUM_PARALLEL OLLAMA_CONTEXT_LENGTH OLLAMA_FLASH_ATTENTION
    OLLAMA_KV_CACHE_TYPE OLLAMA_KEEP_ALIVE OLLAMA_MODELS OLLAMA_MAX_LOADED_MODELS OLLAMA_MAX_QUEUE
    OLLAMA_ORIGINS OLLAMA_LOAD_TIMEOUT OLLAMA_GPU_OVERHEAD OLLAMA_SCHED_SPREAD
    """
)
"""Of envconfig/config.go."""

OLLAMA_CACHES = frozenset({"f16", "q8_0", "q4_0"})
"""Values of OLLAMA_KV_CACHE_TYPE in its docs/faq.mdx."""
