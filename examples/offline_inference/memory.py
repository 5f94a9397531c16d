"""How much room adapters get: slots in a batch, the largest rank, adapters kept in host memory."""

from aiolora import LLM

llm = LLM(
    model="smollm2-135m",
    enable_lora=True,
    max_loras=4,  # 4 active slots
    max_lora_rank=64,
    max_cpu_loras=10,  # Cache 10 adapters in CPU
    gpu_memory_utilization=0.85,  # May need to reduce from 0.9
)
print(llm.engine.snapshot())
