"""The study's own command, end to end, on local copies in the hub's layout and schema.

The seven references and the policy are tiny7's models under the hub's names; everything else (NF4
weights, LoRA, bf16, filters, weighting, evaluations) is the protocol, with fewer pairs.
"""

import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

import train
from mrpo_lab.command import run_cli
from mrpo_lab.embedded.synthetic import synthetic_rows

ROOT = Path(__file__).parent.parent


@pytest.fixture
def local_hub(tmp_path: Path, tiny7_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """SafeRLHF's schema in parquet, and MRPO_LAB_MODELS with the eight names of the protocol."""
    rows = [
        {
            key: [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row[key]},
            ]
            for key in ("chosen", "rejected")
        }
        for row in synthetic_rows(200, seed=5)
    ]
    data = tmp_path / "PKU-SafeRLHF-30K-standard" / "data"
    data.mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(data / "train-00000-of-00001.parquet")
    entries = yaml.safe_load((ROOT / "conf/reference_set/paper7.yaml").read_text())["entries"]
    anchor_first = sorted(tiny7_dir.iterdir(), key=lambda folder: folder.name != "tiny-qwen2")
    tiny = [folder for folder in anchor_first if (folder / "config.json").is_file()]
    for entry, folder in zip(entries, tiny, strict=True):
        link = tmp_path / "models" / entry["path"]
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder)
    monkeypatch.setenv("MRPO_LAB_MODELS", str(tmp_path / "models"))
    return data.parent


def test_paper_command_runs_from_local_copies(
    local_hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = tmp_path / "outputs"
    small = ["dataset.pool=90", "dataset.train=60", "dataset.val=14", "dataset.test=16"]
    command = ["loss=mdpo", "weighting=vaw", "dataset=saferlhf", f"dataset.path={local_hub}"]
    monkeypatch.setattr(
        "sys.argv", ["train.py", *command, *small, f"outputs={outputs}", "tracker=local"]
    )
    run_cli(train.train, train.CONF)

    (folder,) = (path.parent for path in outputs.rglob("result.json"))
    result = json.loads((folder / "result.json").read_text())
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["quantization"] == "nf4"
    assert result["status"] == "finished"
    assert result["steps"] == 2  # batches of 50
    assert len(result["references"]) == 7
    accuracies = [r["val_accuracy"] for r in result["references"].values()]
    for reference in result["references"].values():
        # VAW: alpha is each reference's share of right validation pairs.
        expected = reference["val_accuracy"] / sum(accuracies)
        assert reference["mean_alpha"] == pytest.approx(expected, abs=1e-12)
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])
    # A fresh LoRA changes nothing, so against its own initial model, but for NF4, the loss is ln 2.
    assert first["loss_by_reference/qwen2.5-0.5b"] == pytest.approx(0.6931, abs=5e-3)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
