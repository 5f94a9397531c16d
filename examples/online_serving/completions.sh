#!/bin/sh
# Make requests using the adapter name as the model ID.
curl --silent --show-error "${AIOLORA_URL:-http://localhost:8000}/v1/completions" \
  -H "Content-Type: application/json" \
  -d '{
    "model": "sql-lora",
    "prompt": "Generate SQL for: SELECT * FROM users WHERE",
    "max_tokens": 100,
    "temperature": 0
  }'
