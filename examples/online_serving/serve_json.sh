#!/bin/sh
# The JSON form of --lora-modules, with base model lineage. "$@" takes further flags (--port 8001).
exec aiolora serve smollm2-135m --enable-lora \
  --lora-modules '{"name": "sql-lora", "path": "aiolora/smollm2-135m-sql", "base_model_name": "HuggingFaceTB/SmolLM2-135M-Instruct"}' "$@"
