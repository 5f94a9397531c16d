import subprocess
import sys


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


def test_every_public_name_is_there() -> None:
    import aiolora

    for name in aiolora.__all__:
        assert getattr(aiolora, name) is not None
