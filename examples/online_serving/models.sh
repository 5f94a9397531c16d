#!/bin/sh
# The base model is also available: it comes first, the adapters follow.
curl --silent --show-error "${AIOLORA_URL:-http://localhost:8000}/v1/models" | jq .
