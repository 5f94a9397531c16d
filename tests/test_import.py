import subprocess
import sys

from tests.conftest import ModelOf


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_aiolora_loads_neither_torch_nor_transformers_nor_a_server() -> None:
    loaded = _python(
        "import sys, aiolora, aiolora.lora.request\n"
        "print([m for m in ('torch', 'transformers', 'litestar', 'triton') if m in sys.modules])"
    )
    assert loaded == "[]"


def test_importing_aiolora_executes_little_code() -> None:
    count = int(_python("import sys; before = len(sys.modules); import aiolora; print(len(sys.modules) - before)"))
    assert count < 120, f"{count} modules are imported; the engine's are to wait until they are used"


def test_an_engine_starts_without_compilers_trainers_servers_and_bars(model_of: ModelOf) -> None:
    """Each is hundreds of modules; some came by way of the config of a Llama."""
    unused = ("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy", "scipy", "accelerate", "peft")
    unused += ("transformers.modeling_utils", "transformers.activations", "litestar", "rich", "triton")
    loaded = _python(
        "import sys\n"
        "from aiolora import LLM, AsyncLLMEngine\n"
        f"llm = LLM({str(model_of('llama'))!r}, enable_lora=True, max_model_len=32, device='cpu')\n"
        f"print([name for name in {unused} if name in sys.modules])"
    )
    assert loaded == "[]"


def test_every_public_name_is_there() -> None:
    import aiolora

    for name in aiolora.__all__:
        assert getattr(aiolora, name) is not None
