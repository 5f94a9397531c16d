"""Several adapters in one engine that is stepped by hand: base and adapter requests share its batches."""

from aiolora import EngineArgs, LLMEngine, SamplingParams
from aiolora.lora.request import LoRARequest

# Initialize with multi-LoRA support
engine_args = EngineArgs(
    model="smollm2-135m",
    enable_lora=True,
    max_loras=2,  # Number of LoRAs that can be active simultaneously
    max_lora_rank=64,  # Maximum rank across all adapters
    max_cpu_loras=4,  # Size of CPU cache for swapped-out adapters
)
engine = LLMEngine.from_engine_args(engine_args)

# Define requests with different adapters
requests = [
    ("Base model prompt", None),
    ("SQL task prompt", LoRARequest("sql-lora", 1, "examples/adapters/sql")),
    ("JSON task prompt", LoRARequest("json-lora", 2, "examples/adapters/json")),
    ("Another SQL prompt", LoRARequest("sql-lora", 1, "examples/adapters/sql")),
]

sampling_params = SamplingParams(temperature=0.8, max_tokens=256)

# Add requests to engine
for i, (prompt, lora_request) in enumerate(requests):
    engine.add_request(
        str(i),
        prompt,
        sampling_params,
        lora_request=lora_request,
    )

# Process all requests (aiolora handles adapter switching)
while engine.has_unfinished_requests():
    outputs = engine.step()
    for output in outputs:
        if output.finished:
            print(f"Request {output.request_id}: {output.outputs[0].text}")
