"""Download an adapter and use it with the base model."""

from huggingface_hub import snapshot_download

from aiolora import LLM, SamplingParams
from aiolora.lora.request import LoRARequest

# Download the LoRA adapter
sql_lora_path = snapshot_download(repo_id="aiolora/smollm2-135m-sql")

# Initialize base model with LoRA support
llm = LLM(
    model="smollm2-135m",
    enable_lora=True,
)

# Configure sampling
sampling_params = SamplingParams(
    temperature=0,
    max_tokens=256,
    stop=["[/assistant]"],
)

# Prompts for the SQL adapter
prompts = [
    "[user] Write a SQL query to answer the question based on the table schema.\n\n"
    "context: CREATE TABLE airports (icao VARCHAR, airport VARCHAR)\n\n"
    "question: Name the ICAO for Lilongwe International Airport [/user] [assistant]",
]

# Generate with LoRA adapter
outputs = llm.generate(
    prompts,
    sampling_params,
    lora_request=LoRARequest("sql_adapter", 1, sql_lora_path),
)

for output in outputs:
    print(f"Generated SQL: {output.outputs[0].text}")
