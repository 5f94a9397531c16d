"""Base and adapter requests of one LLM, one after another."""

from huggingface_hub import snapshot_download

from aiolora import LLM, SamplingParams
from aiolora.lora.request import LoRARequest

# Download adapters
sql_adapter = snapshot_download("aiolora/smollm2-135m-sql")

# Initialize with LoRA support
llm = LLM(
    model="smollm2-135m",
    enable_lora=True,
    max_loras=2,
    max_lora_rank=64,
    max_cpu_loras=5,
)

sampling_params = SamplingParams(
    temperature=0.7,
    top_p=0.9,
    max_tokens=200,
)

# Mix base model and adapter requests
requests = [
    # Base model request
    {
        "prompt": "Explain what LoRA adapters are:",
        "lora_request": None,
    },
    # SQL adapter request
    {
        "prompt": "[user] Generate SQL: SELECT users WHERE age > [/user] [assistant]",
        "lora_request": LoRARequest("sql", 1, sql_adapter),
    },
    # Another SQL request (reuses cached adapter)
    {
        "prompt": "[user] Generate SQL: JOIN tables on [/user] [assistant]",
        "lora_request": LoRARequest("sql", 1, sql_adapter),
    },
]

# Generate (aiolora batches compatible requests)
for req in requests:
    outputs = llm.generate(
        req["prompt"],
        sampling_params,
        lora_request=req["lora_request"],
    )
    adapter = req["lora_request"].lora_name if req["lora_request"] else "base"
    print(f"Adapter: {adapter}")
    print(f"Output: {outputs[0].outputs[0].text}")
    print("-" * 80)
